package main

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// endpoints returns the routes as a reader is told them: method and path.
func endpoints(t *testing.T) (list []string) {
	t.Helper()
	cfg, err := loadConfig(lookup(nil))
	fatalIf(t, err)
	log := slog.New(slog.DiscardHandler)
	tokens := newSource(cfg, log, io.Discard)
	for _, rt := range newRoutes(newProxy(cfg, tokens, newMetrics(), nil), newModels(cfg, tokens, nil, log), tokens, &health{}) {
		list = append(list, rt.method+" "+rt.path)
	}
	return list
}

func TestREADMEListsEveryRoute(t *testing.T) {
	b := readFile(t, "README.md")
	_, section, _ := strings.Cut(string(b), "\n## Endpoints\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var listed []string
	for line := range strings.Lines(section) {
		if cells := strings.Split(line, "|"); len(cells) > 2 {
			for _, match := range regexp.MustCompile("`([A-Z]+ /[^`]*)`").FindAllStringSubmatch(cells[1], -1) {
				listed = append(listed, match[1])
			}
		}
	}
	if diff := cmp.Diff(endpoints(t), listed); diff != "" {
		t.Errorf("the README's table of endpoints (-routes +README):\n%s", diff)
	}
}

func TestA404NamesEveryRoute(t *testing.T) {
	p := start(t, map[string]string{"QWEN_API_KEY": "sk-test"})
	res, body := p.get("/v1/nonsense")
	message := wantError(t, res, body, 404, typeInvalidRequest, "unknown_url").Error.Message
	for _, endpoint := range endpoints(t) {
		_, path, _ := strings.Cut(endpoint, " ")
		if !regexp.MustCompile(regexp.QuoteMeta(path) + `[,.]`).MatchString(message) {
			t.Errorf("%q does not name %s", message, path)
		}
	}
	if line := p.stderr.await(t, `(?m)^(.*"status":404.*)$`); !strings.Contains(line, `"error":"There is no /v1/nonsense."`) {
		t.Errorf("the log has %s", line)
	}
}

// TestEveryRouteIsCounted: with and without /v1 it counts under the name that the README gives it.
func TestEveryRouteIsCounted(t *testing.T) {
	m := newMetrics()
	h := metricsHandler(t, m)
	want, got := map[string]int64{"other": 0}, map[string]int64{}
	for _, endpoint := range endpoints(t) {
		method, path, _ := strings.Cut(endpoint, " ")
		for _, target := range []string{path, strings.TrimPrefix(path, "/v1")} {
			r := httptest.NewRequest(method, "http://localhost"+strings.Replace(target, "{id}", "org/x", 1), strings.NewReader(ordinaryChat))
			h.ServeHTTP(&discard{http.Header{}}, r)
			want[path]++
		}
	}
	for _, r := range m.routes {
		for i := range r.statuses {
			got[r.path] += r.statuses[i].Load()
		}
	}
	wantEqual(t, "requests by route", want, got)
}

func TestAnotherMethodIsNotAllowed(t *testing.T) {
	p := start(t, map[string]string{"QWEN_API_KEY": "sk-test"})
	for _, tt := range []struct{ method, path, allow, message string }{
		{"GET", "/v1/chat/completions", "POST", "Method GET is not allowed here. Use POST."},
		{"DELETE", "/v1/models", "GET, HEAD", "Method DELETE is not allowed here. Use GET."},
		{"POST", "/v1/models/org/x", "GET, HEAD", "Method POST is not allowed here. Use GET."},
		{"PUT", "/", "GET, HEAD", "Method PUT is not allowed here. Use GET."},
		{"HEAD", "/embeddings", "POST", ""},
	} {
		res, body := p.send(tt.method, tt.path, nil)
		if got := res.Header.Get("Allow"); res.StatusCode != 405 || got != tt.allow {
			t.Errorf("%s %s: %s, Allow %q, want 405, %q", tt.method, tt.path, res.Status, got, tt.allow)
		}
		if tt.message == "" { // HEAD has no body
			continue
		}
		if e := wantError(t, res, body, 405, typeInvalidRequest, "method_not_allowed"); e.Error.Message != tt.message {
			t.Errorf("%s %s: message %q, want %q", tt.method, tt.path, e.Error.Message, tt.message)
		}
	}
}
