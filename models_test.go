package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

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
		{"MODELS alone", map[string]string{"MODELS": "b,a"}, []string{"b", "a"}},
		{"MODELS with a key", map[string]string{"MODELS": "b,c", "QWEN_API_KEY": "sk-test"}, []string{"b", "c"}},
		{"the same twice", map[string]string{"MODELS": "a,a"}, []string{"a"}},
		{"MODELS without the default model", map[string]string{"MODELS": "a", "DEFAULT_MODEL": "org/b"}, []string{"a"}},
		{"the built-in list with the default model", map[string]string{"DEFAULT_MODEL": "org/b"},
			[]string{"coder-model", "qwen3-coder-plus", "qwen3-coder-flash", "vision-model", "org/b"}},
		{"aliases, in order", map[string]string{"MODELS": "a", "MODEL_ALIASES": "gpt-4o=a,gpt-3.5=a"}, []string{"a", "gpt-3.5", "gpt-4o"}},
		{"an alias by a model's name", map[string]string{"MODELS": "a", "MODEL_ALIASES": "a=b"}, []string{"a"}},
		{"an alias as the default model", map[string]string{"DEFAULT_MODEL": "fast", "MODEL_ALIASES": "fast=org/b"},
			[]string{"coder-model", "qwen3-coder-plus", "qwen3-coder-flash", "vision-model", "org/b", "fast"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			env := map[string]string{"API_BASE_URL": "http://127.0.0.1:1/v1"} // where nobody is
			maps.Copy(env, tt.env)
			_, body := start(t, env).get("/v1/models")
			var want []string
			for _, id := range tt.want {
				want = append(want, fmt.Sprintf(`{"id":%q,"object":"model","created":1753142400,"owned_by":"qwen"}`, id))
			}
			wantEqual(t, "list", `{"object":"list","data":[`+strings.Join(want, ",")+"]}\n", body)
		})
	}
}

// TestTheUpstreamsModelsAreListed follows one list through its life: had, kept, asked for again, lost, found again.
func TestTheUpstreamsModelsAreListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		var answer atomic.Pointer[http.HandlerFunc]
		b := inBubble(t, map[string]string{"MODELS": "mine", "MODEL_ALIASES": "gpt-4o=live-1", "DEFAULT_MODEL": "mine"}, func(w http.ResponseWriter, r *http.Request) {
			asked.Add(1)
			if r.URL.Path != "/v1/models" || r.Header.Get("Authorization") != "Bearer sk-test" {
				t.Errorf("asked for %s with %v", r.URL, r.Header)
			}
			(*answer.Load())(w, r)
		})
		list := func(models string) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				answerJSON(w, 200, `{"object":"list","data":[`+models+`]}`)
			}
		}
		alias := string(ownModel("gpt-4o"))
		check := func(when, want string, times int64) {
			t.Helper()
			res, err := b.client.Get("http://proxy/v1/models")
			fatalIf(t, err)
			defer res.Body.Close()
			got, err := io.ReadAll(res.Body)
			if want = `{"object":"list","data":[` + want + "]}\n"; string(got) != want || err != nil {
				t.Errorf("%s: %s, %v, want %s", when, got, err, want)
			}
			if n := asked.Load(); n != times {
				t.Errorf("%s: the upstream was asked %d times, want %d", when, n, times)
			}
		}
		set := func(h http.HandlerFunc) { answer.Store(&h) }

		own := string(ownModel("mine")) + "," + alias
		set(func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 500, `{}`) })
		check("it fails", own, 1)
		set(list(`{"id":"live-1","object":"model","context_length":1000}`))
		check("soon after", own, 1)
		time.Sleep(modelsRetry)
		check("then", `{"id":"live-1","object":"model","context_length":1000},`+alias, 2)
		set(list(`{"id":"live-2"},{"id":"live-2"},{"id":""},7`))
		time.Sleep(modelsFresh - time.Second)
		check("it is kept", `{"id":"live-1","object":"model","context_length":1000},`+alias, 2)
		time.Sleep(time.Second)
		check("a new one", `{"id":"live-2"},`+alias, 3)
		for n, h := range []http.HandlerFunc{
			list(""),
			list(`{"name":"no-id"},{"id":1},7`),
			func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") },
			func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "http://127.0.0.1/v1/models?x", http.StatusFound)
			},
			func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) },
			func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, // never answers
		} {
			set(h)
			time.Sleep(modelsFresh)
			check("what there was serves", `{"id":"live-2"},`+alias, int64(4+n))
		}
		set(list(`{"id":"live-3"}`))
		time.Sleep(modelsRetry)
		var many sync.WaitGroup
		for range 20 {
			many.Go(func() { check("many at once", `{"id":"live-3"},`+alias, 10) })
		}
		many.Wait()

		// Who asked leaves, and others wait for the answer.
		set(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(2 * time.Second)
			list(`{"id":"live-4"}`)(w, r)
		})
		time.Sleep(modelsFresh)
		ctx, leave := context.WithTimeout(t.Context(), time.Second)
		defer leave()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://proxy/v1/models", nil)
		fatalIf(t, err)
		if _, err := b.client.Do(req); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("who leaves got %v", err)
		}
		check("for another", `{"id":"live-4"},`+alias, 11)
	})
}

func TestOneModel(t *testing.T) {
	p := start(t, map[string]string{
		"QWEN_API_KEY": "sk-test", "API_BASE_URL": "http://127.0.0.1:1/v1", "MODELS": "plain,org/deep/model:1.5,50%", "MODEL_ALIASES": "gpt-4o=plain,openai/gpt-4o=plain"})
	for _, tt := range []struct{ path, id string }{ // "" for none
		{"/v1/models/plain", "plain"},
		{"/models/plain", "plain"},
		{"/v1/models/qwen3-coder-plus", ""}, // the default model, which MODELS does not name
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
