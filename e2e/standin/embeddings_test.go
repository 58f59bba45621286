package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEmbeddings(t *testing.T) {
	c := newClient(t, newStandIn())
	c.signIn()
	_, answer := c.post("/v1/embeddings", `{"model":"m","input":["one two","three","one two"],"dimensions":100}`)
	wantEqual(t, "answer", []any{"list", "m", object{"prompt_tokens": 5.0, "total_tokens": 5.0}},
		[]any{answer["object"], answer["model"], answer["usage"]})
	vector := func(i int) []any { v, _ := dig(answer, "data", i, "embedding").([]any); return v }
	wantEqual(t, "equal texts", vector(0), vector(2))
	if cmp.Equal(vector(0), vector(1)) {
		t.Error("different texts have equal vectors")
	}
	var square float64
	for _, x := range vector(0) {
		square += x.(float64) * x.(float64)
	}
	if len(vector(0)) != 100 || math.Abs(square-1) > 1e-5 {
		t.Errorf("%d dimensions, length %v", len(vector(0)), math.Sqrt(square))
	}

	_, answer = c.post("/v1/embeddings", `{"model":"m","input":"one two","encoding_format":"base64"}`)
	encoded, _ := dig(answer, "data", 0, "embedding").(string)
	raw, err := base64.StdEncoding.DecodeString(encoded)
	fatalIf(t, err)
	got := make([]float32, 64)
	if err := binary.Read(bytes.NewReader(raw), binary.LittleEndian, got); err != nil || len(raw) != 4*len(got) {
		t.Fatalf("%d bytes: %v", len(raw), err)
	}
	wantEqual(t, "base64", textVector("one two", 64), got)
}
