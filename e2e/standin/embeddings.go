package main

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"math"
	mathrand "math/rand/v2"
	"net/http"
	"slices"
	"strings"
)

const maxInputs = 2048 // texts in one embeddings request

// embeddings answers an embeddings request. Equal texts have equal vectors; nothing else is meant by them.
func (s *standIn) embeddings(w http.ResponseWriter, r *http.Request) *apiError {
	req := struct {
		Model          string     `json:"model"`
		Input          stringList `json:"input"`
		Dimensions     int        `json:"dimensions"`
		EncodingFormat string     `json:"encoding_format"`
	}{Dimensions: 64, EncodingFormat: "float"}
	if failure := s.read(w, r, &req); failure != nil {
		return failure
	}
	switch {
	case req.Model == "":
		return invalidRequest("model", "missing_required_parameter", "model is missing.")
	case len(req.Input) == 0 || len(req.Input) > maxInputs || slices.Contains(req.Input, ""):
		return invalidRequest("input", "invalid_value",
			"input must be a string, or an array of 1 to %d strings, none of them empty.", maxInputs)
	case req.Dimensions < 1 || req.Dimensions > 2048:
		return invalidRequest("dimensions", "invalid_value", "dimensions must be between 1 and 2048.")
	case req.EncodingFormat != "float" && req.EncodingFormat != "base64":
		return invalidRequest("encoding_format", "invalid_value", "encoding_format must be float or base64.")
	}
	if failure := fault(req.Model); failure != nil {
		return failure
	}
	data := make([]object, len(req.Input))
	tokens := 0
	for i, text := range req.Input {
		var embedding any = textVector(text, req.Dimensions)
		if req.EncodingFormat == "base64" {
			b, _ := binary.Append(nil, binary.LittleEndian, embedding) // float32s have a fixed size
			embedding = base64.StdEncoding.EncodeToString(b)
		}
		data[i] = object{"object": "embedding", "index": i, "embedding": embedding}
		tokens += len(strings.Fields(text))
	}
	writeJSON(w, http.StatusOK, object{"object": "list", "model": req.Model, "data": data,
		"usage": object{"prompt_tokens": tokens, "total_tokens": tokens}})
	return nil
}

// textVector returns a vector of length 1 that text's hash determines.
func textVector(text string, dimensions int) []float32 {
	random := mathrand.New(mathrand.NewChaCha8(sha256.Sum256([]byte(text))))
	vector := make([]float32, dimensions)
	var square float64
	for i := range vector {
		x := random.NormFloat64()
		vector[i] = float32(x)
		square += x * x
	}
	for i := range vector {
		vector[i] /= float32(math.Sqrt(square))
	}
	return vector
}
