package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestModelList(t *testing.T) {
	for _, tt := range []struct {
		name string
		env  map[string]string
		want []string
	}{
		{"signed in", nil, []string{"coder-model", "qwen3-coder-plus", "qwen3-coder-flash", "vision-model"}},
		{"with a key", map[string]string{"QWEN_API_KEY": "sk-test"},
			[]string{"qwen3-coder-plus", "qwen3-coder-flash", "qwen3.6-plus", "qwen3.7-plus", "qwen3.7-max", "qwen3.8-flash", "text-embedding-v4"}},
		{"MODELS", map[string]string{"MODELS": "b,a,qwen3-coder-plus"}, []string{"b", "a", "qwen3-coder-plus"}},
		{"MODELS with a key", map[string]string{"MODELS": "b,qwen3-coder-plus", "QWEN_API_KEY": "sk-test"}, []string{"b", "qwen3-coder-plus"}},
		{"the same twice", map[string]string{"MODELS": "a,a", "DEFAULT_MODEL": "a"}, []string{"a"}},
		{"the default model", map[string]string{"MODELS": "a", "DEFAULT_MODEL": "org/b"}, []string{"a", "org/b"}},
		{"aliases, in order", map[string]string{"MODELS": "a", "DEFAULT_MODEL": "a", "MODEL_ALIASES": "gpt-4o=a,gpt-3.5=a,a=b"}, []string{"a", "gpt-3.5", "gpt-4o"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg, err := loadConfig(lookup(tt.env))
			if err != nil {
				t.Fatal(err)
			}
			w := httptest.NewRecorder()
			newModels(cfg).all(w, nil)
			var got struct {
				Object string
				Data   []map[string]any
			}
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			want := []map[string]any{}
			for _, id := range tt.want {
				want = append(want, map[string]any{"id": id, "object": "model", "created": 1753142400.0, "owned_by": "qwen"})
			}
			if diff := cmp.Diff(want, got.Data); diff != "" || got.Object != "list" {
				t.Errorf("object %q, data (-want +got):\n%s", got.Object, diff)
			}
		})
	}
}

func TestOneModel(t *testing.T) {
	p := start(t, map[string]string{
		"QWEN_API_KEY": "sk-test", "MODELS": "plain,org/deep/model:1.5,50%", "MODEL_ALIASES": "gpt-4o=plain,openai/gpt-4o=plain"})
	for _, tt := range []struct{ path, id string }{ // "" for none
		{"/v1/models/plain", "plain"},
		{"/models/plain", "plain"},
		{"/v1/models/qwen3-coder-plus", "qwen3-coder-plus"},
		{"/v1/models/gpt-4o", "gpt-4o"},
		{"/v1/models/org/deep/model:1.5", "org/deep/model:1.5"},
		{"/v1/models/org%2Fdeep%2fmodel%3A1.5", "org/deep/model:1.5"},
		{"/models/openai/gpt-4o", "openai/gpt-4o"},
		{"/v1//models//plain", "plain"},
		{"/v1/models/50%25", "50%"},
		{"/v1/models/Plain", ""},
		{"/v1/models/plain/", "plain"},
		{"/v1/models/deep/model:1.5", ""},
		{"/v1/models/text-embedding-v4", ""}, // of the built-in list, in whose place MODELS is
		{"/v1/models/%3Cscript%3E%00%ff", ""},
	} {
		t.Run(tt.path, func(t *testing.T) {
			res, body := p.get(tt.path)
			if tt.id == "" {
				e := wantError(t, res, body, http.StatusNotFound, typeInvalidRequest, "model_not_found")
				if e.Error.Param == nil || *e.Error.Param != "model" {
					t.Errorf("param %v, want model", e.Error.Param)
				}
				return
			}
			var got map[string]any
			if err := json.Unmarshal([]byte(body), &got); err != nil {
				t.Fatalf("%s %s", res.Status, body)
			}
			want := map[string]any{"id": tt.id, "object": "model", "created": 1753142400.0, "owned_by": "qwen"}
			if diff := cmp.Diff(want, got); diff != "" || res.StatusCode != http.StatusOK {
				t.Errorf("%s, model (-want +got):\n%s", res.Status, diff)
			}
		})
	}
}
