package main

import (
	"fmt"
	"net/http"
)

// An apiError is an error response of the API.
type apiError struct {
	status             int
	typ, code, message string
	param              string // the member of the request that is wrong; "" is JSON null
}

// invalidRequest returns a 400 about param, a member of the request's body ("" for the body as a whole).
func invalidRequest(param, code, format string, args ...any) *apiError {
	return &apiError{status: http.StatusBadRequest, typ: "invalid_request_error", code: code, param: param, message: fmt.Sprintf(format, args...)}
}

// body returns the error in OpenAI's shape.
func (e *apiError) body(requestID string) object {
	detail := object{"message": e.message, "type": e.typ, "param": nil, "code": e.code}
	if e.param != "" {
		detail["param"] = e.param
	}
	return object{"error": detail, "request_id": requestID}
}

// messagesBody returns the error in the shape of the Messages API.
func (e *apiError) messagesBody(requestID string) object {
	types := map[int]string{
		http.StatusUnauthorized: "authentication_error", http.StatusForbidden: "permission_error", http.StatusNotFound: "not_found_error",
		http.StatusRequestEntityTooLarge: "request_too_large", http.StatusTooManyRequests: "rate_limit_error",
	}
	typ, ok := types[e.status]
	if !ok {
		typ = "invalid_request_error"
		if e.status >= 500 {
			typ = "api_error"
		}
	}
	return object{"type": "error", "error": object{"type": typ, "message": e.message}, "request_id": requestID}
}

// categoryOf returns the type of an error of the given status.
func categoryOf(status int) string {
	switch {
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return "authentication_error"
	case status == http.StatusTooManyRequests:
		return "rate_limit_error"
	case status >= 500:
		return "server_error"
	}
	return "invalid_request_error"
}
