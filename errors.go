package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The categories of failure: an error body's type and the log's error_type.
const (
	typeAuthentication = "authentication_error"
	typeInvalidRequest = "invalid_request_error"
	typeNetwork        = "network_error"
	typeRateLimit      = "rate_limit_error"
	typeStreaming      = "streaming_error"
	typeConfiguration  = "configuration_error"
	typeServer         = "server_error"
)

// codeRateLimit is the code of a request that the proxy's own limiter refused.
const codeRateLimit = "rate_limit_exceeded"

// codeInternal is the code of a request that ran into a defect of the proxy.
const codeInternal = "internal_error"

// statusClientClosedRequest is what the access log says of a client that left before its answer
// (nginx's 499). It is never sent.
const statusClientClosedRequest = 499

// errNotTaken is why an answer was cut short whose other end has not failed.
var errNotTaken = &apiError{status: statusClientClosedRequest, typ: typeNetwork, code: "client_closed_request",
	message: "The client closed the connection, or took nothing for WRITE_TIMEOUT."}

// An apiError is a failure as the client is told of it, in the shape of OpenAI's errors.
type apiError struct {
	status     int           // HTTP status
	typ        string        // one of the type constants
	code       string        // "" is JSON null
	param      string        // the member of the request that is wrong; "" is JSON null
	message    string        // says what to do next; no secrets, no message text
	hint       string        // follows message in the answer, and is left out of the log; may be ""
	retryAfter time.Duration // the Retry-After header, rounded up to seconds; 0 for none
	header     http.Header   // other headers of the answer; may be nil
	err        error         // what happened, for the log alone; may be nil
}

func (e *apiError) Error() string {
	if e.err != nil {
		return e.message + " (" + e.err.Error() + ")"
	}
	return e.message
}

func (e *apiError) Unwrap() error { return e.err }

// ours reports whether e, of a request that went to Qwen, is neither Qwen's doing nor that of the way to it: the client
// left, the proxy stopped, or it has a defect.
func (e *apiError) ours() bool {
	switch e.code { // the status may be Qwen's
	case errNotTaken.code, errShuttingDown.code, codeInternal:
		return true
	}
	return false
}

// invalidRequest returns a 400 about param, a member of the request's body ("" for the body as a whole).
func invalidRequest(param, code, format string, args ...any) *apiError {
	return &apiError{
		status: http.StatusBadRequest, typ: typeInvalidRequest,
		param: param, code: code, message: fmt.Sprintf(format, args...),
	}
}

// toAPIError turns any error of the request path into what the client is told. An error that is not an
// apiError has come from the way to Qwen or is a defect of ours; its text is for the log alone.
func toAPIError(err error) *apiError {
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, context.Canceled):
		return &apiError{status: statusClientClosedRequest, typ: typeNetwork, code: "client_closed_request",
			message: "The client closed the request.", err: err}
	case errors.As(err, &timeout) && timeout.Timeout():
		e := *errUpstreamTimeout
		e.err = err
		return &e
	default:
		return &apiError{status: http.StatusBadGateway, typ: typeNetwork, code: "upstream_unreachable",
			message: "Qwen could not be reached. Try again; if it lasts, check the proxy's network and its log.", err: err}
	}
}

// body returns the JSON of OpenAI's error shape, on one line.
func (e *apiError) body(requestID string) []byte {
	type detail struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    *string `json:"code"`
	}
	d := detail{Message: strings.TrimSpace(e.message + " " + e.hint), Type: e.typ}
	if e.param != "" {
		d.Param = &e.param
	}
	if e.code != "" {
		d.Code = &e.code
	}
	b, err := json.Marshal(struct {
		Error     detail `json:"error"`
		RequestID string `json:"request_id"`
	}{d, requestID})
	if err != nil {
		panic(err) // strings alone always marshal
	}
	return b
}

// retryAfterSeconds is the Retry-After header's value for d (RFC 9110 §10.2.3), at least 1.
func retryAfterSeconds(d time.Duration) string {
	return strconv.FormatInt(max(1, int64(math.Ceil(d.Seconds()))), 10)
}
