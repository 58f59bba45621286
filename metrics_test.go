package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"qwen-go-proxy/e2e/testkit"
)

// A scrape is a page of /metrics: the value of each sample, by its name and labels as they stand there.
type scrape map[string]float64

// of returns the samples whose name is family's, without it.
func (s scrape) of(family string) map[string]float64 {
	found := map[string]float64{}
	for series, value := range s {
		if name, labels, _ := strings.Cut(series, "{"); name == family {
			found["{"+labels] = value
		}
	}
	return found
}

var (
	metaLine   = regexp.MustCompile(`^# (HELP|TYPE) ([a-z_]+) (.+)\n$`)
	sampleLine = regexp.MustCompile(`^([a-z_]+)((?:\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})?) (\S+)\n$`)
	leLabel    = regexp.MustCompile(`le="([^"]*)"`)
)

// parsePage reads a page as strictly as anybody could: each family is a HELP, a TYPE, and its samples, all in one place;
// no series comes twice; counters end in _total; a histogram's buckets are sorted and add up.
func parsePage(text string) (scrape, error) {
	s, types := scrape{}, map[string]string{}
	family, help := "", ""
	var bound, count float64 // of the bucket before
	for line := range strings.Lines(text) {
		if m := metaLine.FindStringSubmatch(line); m != nil {
			switch _, seen := types[m[2]]; {
			case m[1] == "HELP" && !seen:
				help = m[2]
			case m[1] == "TYPE" && m[2] == help && !seen:
				family, types[m[2]] = m[2], m[3]
			default:
				return nil, fmt.Errorf("out of place: %s", line)
			}
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("not a sample: %q", line)
		}
		name, labels := m[1], m[2]
		value, err := strconv.ParseFloat(m[3], 64)
		if _, twice := s[name+labels]; err != nil || value < 0 || twice {
			return nil, fmt.Errorf("a wrong value, or twice: %q", line)
		}
		s[name+labels] = value
		switch suffix, ok := strings.CutPrefix(name, family); types[family] + suffix {
		case "histogram_bucket":
			le, err := strconv.ParseFloat(leLabel.FindStringSubmatch(labels)[1], 64)
			if err != nil || count > 0 && bound < le && value < count {
				return nil, fmt.Errorf("bucket %q after %v", line, count)
			}
			bound, count = le, value
		case "histogram_sum":
		case "histogram_count":
			if !math.IsInf(bound, 1) || count != value {
				return nil, fmt.Errorf("%q after the bucket %v of %v", line, bound, count)
			}
		case "gauge", "counter":
			if !ok || types[family] == "counter" && !strings.HasSuffix(name, "_total") && name != "go_gc_cycles_total_gc_cycles_total" {
				return nil, fmt.Errorf("%q is no sample of %s", line, family)
			}
		default:
			return nil, fmt.Errorf("%q is no sample of the %s %s", line, types[family], family)
		}
	}
	return s, nil
}

// metrics asks for /metrics and reads the page.
func (p *program) metrics() scrape {
	p.t.Helper()
	res, body := p.get("/metrics")
	if got := res.Header.Get("Content-Type"); res.StatusCode != http.StatusOK || got != "text/plain; version=0.0.4; charset=utf-8" {
		p.t.Errorf("status %s, Content-Type %q", res.Status, got)
	}
	s, err := parsePage(body)
	if err != nil || strings.Contains(body, "good-token") {
		p.t.Fatalf("%v, or a secret, in\n%s", err, body)
	}
	return s
}

// metrics is what /metrics says in the bubble.
func (b *bubble) metrics(t *testing.T) scrape {
	t.Helper()
	_, text, err := testkit.Ask(t, b.client, "GET", "http://proxy/metrics", nil)
	fatalIf(t, err)
	s, err := parsePage(text)
	fatalIf(t, err)
	return s
}

// ended waits until the program has logged n requests to path, which it counts before.
func (p *program) ended(path string, n int) {
	p.t.Helper()
	p.stderr.await(p.t, `(?s)(`+strings.Repeat(`"path":"`+path+`".*`, n)+`)`)
}

const ordinaryChat = `{"messages":[]}`

func TestMetricsCountByRouteAndStatus(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		status, _ := strconv.Atoi(r.Header.Get("X-Request-Id"))
		answerJSON(w, max(status, 200), `{"error":{"message":"no"}}`)
	}, nil)
	want := map[string]float64{}
	for _, tt := range []struct{ request, id, series string }{
		{"GET /health", "", `{route="/health",status="200"}`},
		{"HEAD /health", "", `{route="/health",status="200"}`},
		{"GET /metrics", "", `{route="/metrics",status="200"}`},
		{"GET /metrics/", "", `{route="/metrics",status="200"}`},
		{"GET /models/a/b", "", `{route="/v1/models/{id}",status="404"}`},
		{"POST /v1/chat/completions", "200", `{route="/v1/chat/completions",status="200"}`},
		{"POST /v1//chat/completions", "200", `{route="/v1/chat/completions",status="200"}`},
		{"POST /chat/completions", "422", `{route="/v1/chat/completions",status="422"}`},
		{"POST /chat/completions", "418", `{route="/v1/chat/completions",status="418"}`},
		{"POST /chat/completions", "451", `{route="/v1/chat/completions",status="451"}`},
		{"POST /chat/completions", "599", `{route="/v1/chat/completions",status="599"}`},
		{"POST /embeddings", "200", `{route="/v1/embeddings",status="200"}`},
		{"GET /v1/chat/completions", "", `{route="other",status="405"}`},
		{"DELETE /v1/models", "", `{route="other",status="405"}`},
		{"GET /v1/nonsense", "", `{route="other",status="404"}`},
		{"BREW /pot", "", `{route="other",status="404"}`},
	} {
		method, path, _ := strings.Cut(tt.request, " ")
		p.send(method, path, header("X-Request-ID", tt.id))
		want[tt.series]++
	}
	got := p.metrics()
	counts := got.of("qwen_proxy_requests_total")
	if n, ok := counts[`{route="/v1/completions",status="502"}`]; n != 0 || !ok {
		t.Errorf("no series of the failures to come: %v", counts)
	}
	maps.DeleteFunc(counts, func(_ string, n float64) bool { return n == 0 })
	wantEqual(t, "requests by route and status", want, counts)
	byRoute := map[string]float64{}
	for series, n := range want {
		byRoute[series[:strings.IndexByte(series, ',')]+"}"] += n
	}
	wantEqual(t, "counts of the durations", byRoute, got.of("qwen_proxy_request_duration_seconds_count"))
}

// TestMetricsOfTime sees each histogram count at its bucket, by a clock that is exact.
func TestMetricsOfTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, nil, func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(3 * time.Second)
			sse(w, "data: 1\n\n")
			time.Sleep(87 * time.Second)
			sse(w, "data: [DONE]\n\n")
		})
		const requests = 3
		for range requests {
			res := b.post(t, "/v1/chat/completions", ordinaryChat)
			if _, err := io.ReadAll(res.Body); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		got := b.metrics(t)
		for family, h := range map[string]struct {
			took         float64
			below, holds string // bounds
		}{
			"qwen_proxy_request_duration_seconds":   {90, "60", "120"},
			"qwen_proxy_time_to_first_byte_seconds": {3, "2.5", "5"},
		} {
			for bound, want := range map[string]float64{h.below: 0, h.holds: requests, "+Inf": requests} {
				if n, ok := got[family+`_bucket{route="/v1/chat/completions",le="`+bound+`"}`]; !ok || n != want {
					t.Errorf("%s: the bucket %s has %v, want %v", family, bound, n, want)
				}
			}
			if sum := got[family+`_sum{route="/v1/chat/completions"}`]; math.Abs(sum-requests*h.took) > 1e-6 {
				t.Errorf("%s: sum %v, want %v", family, sum, requests*h.took)
			}
		}
	})
}

// TestWhatIsOpenIsCounted asks /metrics and /health/detailed, while a stream is open and after it.
func TestWhatIsOpenIsCounted(t *testing.T) {
	release := make(chan struct{})
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		sse(w, "data: 1\n\n")
		<-release
	}, map[string]string{"RATE_LIMIT_RPS": "0.001", "RATE_LIMIT_BURST": "1"})
	want := func(when string, total, inFlight, streams, upstream float64) {
		t.Helper()
		detailed := map[string]any{"total": total, "in_flight": inFlight, "open_streams": streams, "rate_limited": 1.0, "upstream_errors": 0.0}
		wantEqual(t, "/health/detailed "+when, detailed, p.detailed(nil)["requests"])
		got := p.metrics()
		for name, n := range map[string]float64{"requests_in_flight": inFlight, "open_streams": streams, "rate_limited_total": 1, "upstream_requests_total": upstream, "ready": 1} {
			if got["qwen_proxy_"+name] != n {
				t.Errorf("%s: %s is %v, want %v", when, name, got["qwen_proxy_"+name], n)
			}
		}
	}
	res := p.open("/v1/chat/completions", ordinaryChat)
	limited, body := p.get("/v1/models")
	wantError(t, limited, body, http.StatusTooManyRequests, typeRateLimit, "rate_limit_exceeded")
	want("while a stream is open", 3, 2, 1, 0)
	close(release)
	_, err := io.ReadAll(res.Body)
	fatalIf(t, err)
	p.ended("/v1/chat/completions", 1)
	want("after it", 5, 1, 0, 1)
}

func TestMetricsOfUpstreamErrors(t *testing.T) {
	ctx, leave := context.WithCancel(t.Context())
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body) // or the server would not see its client leave
		switch what := r.Header.Get("X-Request-Id"); what {
		case "page":
			io.WriteString(w, "<html>")
		case "unreachable":
			panic(http.ErrAbortHandler)
		case "broken":
			sse(w, "data: 1\n\n")
			panic(http.ErrAbortHandler)
		case "left":
			leave()
			<-r.Context().Done()
		default:
			status, _ := strconv.Atoi(what)
			answerJSON(w, status, `{"error":{"message":"no"}}`)
		}
	}, map[string]string{"QWEN_API_KEY": "sk-test"})
	for _, what := range []string{"200", "400", "401", "403", "404", "429", "499", "500", "503", "page", "unreachable", "broken", "left"} {
		req, _ := http.NewRequestWithContext(ctx, "POST", p.url+"/v1/chat/completions", strings.NewReader(ordinaryChat))
		req.Header.Set("X-Request-ID", what)
		if res, err := http.DefaultClient.Do(req); err == nil {
			io.Copy(io.Discard, res.Body) // a broken one ends in an error
			res.Body.Close()
		}
	}
	p.post("/v1/chat/completions", `{"messages":`) // goes nowhere
	p.ended("/v1/chat/completions", 14)

	got := p.metrics()
	want := map[string]float64{
		`{category="authentication_error"}`:  2,
		`{category="configuration_error"}`:   0,
		`{category="invalid_request_error"}`: 3,
		`{category="network_error"}`:         2,
		`{category="rate_limit_error"}`:      1,
		`{category="server_error"}`:          2,
		`{category="streaming_error"}`:       1,
	}
	wantEqual(t, "upstream errors", want, got.of("qwen_proxy_upstream_errors_total"))
	if n := got["qwen_proxy_upstream_requests_total"]; n != 13 {
		t.Errorf("%v requests went to Qwen, want 13", n)
	}
	if n := got[`qwen_proxy_requests_total{route="/v1/chat/completions",status="499"}`]; n != 2 {
		t.Errorf("499 is counted %v times, want once for the client and once for the API", n)
	}
	if n := p.detailed(nil)["requests"].(map[string]any)["upstream_errors"]; n != 11.0 {
		t.Errorf("/health/detailed counts %v upstream errors, want 11", n)
	}
	if n := len(got.of("qwen_proxy_token_expiry_timestamp_seconds")) + len(got.of("qwen_proxy_token_refreshes_total")); n != 0 {
		t.Errorf("%d series of tokens, with an API key", n)
	}
}

func TestMetricsOfTheToken(t *testing.T) {
	const expiry = "qwen_proxy_token_expiry_timestamp_seconds"
	for _, tt := range []struct {
		result  string
		status  int // of the OAuth server's answer
		answer  string
		chat    int     // status of the request that needs a fresh token
		expires float64 // in seconds from then
		ready   float64
	}{
		{"success", 200, `{"access_token":"fresh","refresh_token":"r2","expires_in":7200}`, 200, 7200, 1},
		{"refused", 400, `{"error":"invalid_grant"}`, 401, 3600, 0},
		{"failed", 500, `{}`, 503, 3600, 0},
	} {
		p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.URL.Path == "/api/v1/oauth2/token":
				answerJSON(w, tt.status, tt.answer)
			case r.Header.Get("Authorization") != "Bearer fresh":
				answerJSON(w, http.StatusUnauthorized, `{"error":{"message":"no"}}`)
			default:
				answerJSON(w, http.StatusOK, `{"choices":[]}`)
			}
		}, nil)
		if res, body := p.post("/v1/chat/completions", ordinaryChat); res.StatusCode != tt.chat {
			t.Fatalf("%s: %s %s", tt.result, res.Status, body)
		}
		got := p.metrics()
		for _, result := range []string{"success", "refused", "failed"} {
			if n, ok := got[`qwen_proxy_token_refreshes_total{result="`+result+`"}`]; !ok || (n > 0) != (result == tt.result) {
				t.Errorf("%s: %v refreshes with the result %s", tt.result, n, result)
			}
		}
		if left := got[expiry] - float64(time.Now().Unix()); math.Abs(left-tt.expires) > 120 || got["qwen_proxy_ready"] != tt.ready {
			t.Errorf("%s: the token expires in %v s, want %v; ready is %v", tt.result, left, tt.expires, got["qwen_proxy_ready"])
		}
	}
	got := start(t, map[string]string{"QWEN_OAUTH_BASE_URL": "http://127.0.0.1:1"}, "serve").metrics()
	if v, ok := got[expiry]; ok || got["qwen_proxy_ready"] != 0 {
		t.Errorf("not signed in: expiry %v, ready %v", v, got["qwen_proxy_ready"])
	}
}

func TestMetricsOfTheProcess(t *testing.T) {
	t0 := float64(time.Now().Unix())
	got := startWith(t, nil, nil).metrics()
	v := version()
	if got[fmt.Sprintf(`qwen_proxy_build_info{version=%q,commit=%q,goversion=%q}`, v.Version, v.Commit, v.Go)] != 1 {
		t.Errorf("build info: %v", got.of("qwen_proxy_build_info"))
	}
	if n := got["process_start_time_seconds"]; n < t0 || n > t0+60 {
		t.Errorf("started at %v, and it is %v", n, t0)
	}
	names := []string{"go_goroutines", "go_sched_gomaxprocs_threads", "go_memstats_heap_alloc_bytes", "go_memstats_alloc_bytes_total", "go_memstats_sys_bytes", "go_memstats_next_gc_bytes"}
	if runtime.GOOS == "linux" {
		names = append(names, "process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds")
	}
	for _, name := range names {
		if n, ok := got[name]; !ok || n <= 0 && name != "process_cpu_seconds_total" { // it counts in steps of 10 ms
			t.Errorf("%s is %v", name, got[name])
		}
	}
	if runtime.GOOS != "linux" {
		return
	}
	descriptors, err := os.ReadDir("/proc/self/fd")
	fatalIf(t, err)
	if n := float64(len(descriptors)); math.Abs(got["process_open_fds"]-n) > 20 || got["process_max_fds"] < n {
		t.Errorf("%v of %v descriptors are open, want about %v", got["process_open_fds"], got["process_max_fds"], n)
	}
}

// TestDeployedFilesNameMetricsThatExist: a dashboard that asks for another shows nothing, and an alert never fires.
func TestDeployedFilesNameMetricsThatExist(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("elsewhere there are no metrics of the process")
	}
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		answerJSON(w, http.StatusOK, `{"choices":[],"usage":{"prompt_tokens":1}}`)
	}, nil)
	p.post("/v1/chat/completions", ordinaryChat)
	names := map[string]bool{}
	for series := range p.metrics() {
		name, _, _ := strings.Cut(series, "{")
		names[name] = true
	}
	for _, file := range []string{"deploy/grafana-dashboard.json", "deploy/alerts.yaml"} {
		b := readFile(t, file)
		found := regexp.MustCompile(`\b(qwen_proxy|process|go)_[a-z_]+`).FindAllString(string(b), -1)
		if len(found) < 5 {
			t.Errorf("%s names %d metrics", file, len(found))
		}
		for _, name := range found {
			if !names[name] {
				t.Errorf("%s: there is no %s", file, name)
			}
		}
	}
	docs := readFile(t, "docs/operations.md")
	for name := range names {
		name = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		if strings.HasPrefix(name, "qwen_proxy_") && !strings.Contains(string(docs), "`"+name+"`") {
			t.Errorf("docs/operations.md does not name %s", name)
		}
	}
}

// metricsHandler is the whole handler over an API that answers at once, for requests that don't come over a network.
func metricsHandler(t testing.TB, m *metrics) http.Handler {
	cfg, err := loadConfig(lookup(map[string]string{"QWEN_API_KEY": "sk-test", "RATE_LIMIT_RPS": "0"}))
	fatalIf(t, err)
	log := slog.New(slog.DiscardHandler)
	tokens := newSource(cfg, log, io.Discard)
	return newHandler(cfg, log, tokens, newAccess(cfg, log), m, &health{tokens: tokens, metrics: m}, benchTransport{http.Header{"Content-Type": {"application/json"}}})
}

// TestMetricsBlameQwenForNothingOfOurs: neither a client that left, nor a shutdown, nor a bug in the proxy is Qwen's failure.
func TestMetricsBlameQwenForNothingOfOurs(t *testing.T) {
	m := newMetrics()
	for _, err := range []*apiError{errClientLeft, toAPIError(context.Canceled), errShuttingDown, errDefect} {
		m.ended(&exchange{record: record{called: true, err: err}}, time.Second)
		if n := m.upstreamFailures(); n != 0 {
			t.Fatalf("%s counts as Qwen's failure", err.code)
		}
	}
	m.ended(&exchange{record: record{called: true, err: errBroken}}, time.Second)
	if n := m.upstreamFailures(); n != 1 {
		t.Errorf("%d failures, want that of the broken answer alone", n)
	}
}

// TestTheFirstByteIsQwens: neither a keep-alive nor an answer of our own is a first byte of Qwen's.
func TestTheFirstByteIsQwens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, map[string]string{"SSE_KEEPALIVE": "1s"}, func(w http.ResponseWriter, r *http.Request) {
			sse(w)
			time.Sleep(7 * time.Second)
			sse(w, "data: {\"choices\":[{\"index\":0,\"delta\":{\"reasoning_content\":\"x\"}}]}\n\n")
			time.Sleep(2 * time.Second)
			sse(w, "data: [DONE]\n\n")
		})
		for path, body := range map[string]string{"/v1/chat/completions": `{"messages":[]}`, "/v1/completions": `{"prompt":"x"}`} {
			res := b.post(t, path, body)
			if got, err := io.ReadAll(res.Body); err != nil || strings.Count(string(got), ": keep-alive\n\n") < 6 {
				t.Errorf("%s: %q, %v", path, got, err)
			}
		}
		b.post(t, "/v1/chat/completions", "{")
		synctest.Wait()
		if n := strings.Count(b.log.String(), `"first_byte_ms":7000`); n != 2 || strings.Count(b.log.String(), "first_byte_ms") != 2 {
			t.Errorf("want 7000 ms twice:\n%s", b.log)
		}
		got := b.metrics(t)
		want := map[string]float64{`{route="/v1/chat/completions"}`: 7, `{route="/v1/completions"}`: 7}
		wantEqual(t, "sums", want, got.of("qwen_proxy_time_to_first_byte_seconds_sum"))
	})
}
