package main

import (
	"bytes"
	"fmt"
	"maps"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// metrics are the server's counts since its start, for /metrics and /health/detailed. Make them with newMetrics. They are safe for
// concurrent use once every route is registered. Counting a request without tokens takes no lock and no
// allocation.
type metrics struct {
	started     time.Time
	requests    atomic.Int64 // started
	inFlight    atomic.Int64 // now
	streams     atomic.Int64 // open now
	rateLimited atomic.Int64
	logDropped  atomic.Int64 // lines

	upstreamRequests atomic.Int64 // sent to Qwen, and ended
	replays          atomic.Int64 // of those, sent once more because the connection failed
	upstreamErrors   [len(categories)]atomic.Int64

	routes []*routeCounts // the first is for requests that no route matches

	mu     sync.Mutex // guards the maps
	models map[string]bool
	tokens map[[2]string][len(tokenKinds)]int64 // by model and name of the client's key
}

// maxModelSeries bounds the number of models in the metrics, because clients choose them. Further models count as "other".
const maxModelSeries = 100

// categories are the values of the category label: the types of errors that Qwen or the network to it can cause.
var categories = [...]string{typeAuthentication, typeConfiguration, typeInvalidRequest, typeNetwork, typeRateLimit, typeServer, typeStreaming}

// A routeCounts counts the finished requests of one route.
type routeCounts struct {
	path      string             // in labels
	statuses  [1000]atomic.Int64 // 499: the client left before its answer began
	duration  histogram          // until the answer's end
	firstByte histogram          // until the first byte of Qwen's answer; requests without one are not counted
}

// alertStatuses have a series before the first request. A rate does not see a new series appear, and alerts have to see the
// first failures.
var alertStatuses = []int{200, 500, 502, 503, 504}

// bounds are the upper bounds of the histograms' buckets, in seconds. The proxy's own errors take milliseconds, long answers
// take minutes.
var bounds = [...]float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600}

// A histogram counts durations. Its buckets are not cumulative; the page adds them up.
type histogram struct {
	buckets [len(bounds) + 1]atomic.Int64 // the last counts durations above all bounds
	sum     atomic.Int64                  // in ns
}

func (h *histogram) observe(d time.Duration) {
	i := 0
	for i < len(bounds) && d.Seconds() > bounds[i] {
		i++
	}
	h.buckets[i].Add(1)
	h.sum.Add(int64(d))
}

// newMetrics returns the counts of a server that starts now.
func newMetrics() *metrics {
	return &metrics{started: time.Now(), routes: []*routeCounts{{path: "other"}},
		models: map[string]bool{}, tokens: map[[2]string][len(tokenKinds)]int64{}}
}

// register makes the counts for the route of path. It must be called before requests are served.
func (m *metrics) register(path string) { m.routes = append(m.routes, &routeCounts{path: path}) }

// ended counts x, which took this long.
func (m *metrics) ended(x *exchange, took time.Duration) {
	i := slices.IndexFunc(m.routes, func(counts *routeCounts) bool { return counts.path == x.route })
	counts := m.routes[max(i, 0)]
	counts.statuses[x.outcome()].Add(1)
	counts.duration.observe(took)
	if !x.firstByte.IsZero() {
		counts.firstByte.observe(x.firstByte.Sub(x.start))
	}
	if x.called {
		m.upstreamRequests.Add(1)
		if x.err != nil && !x.err.ours() {
			if i := slices.Index(categories[:], x.err.typ); i >= 0 {
				m.upstreamErrors[i].Add(1)
			}
		}
	}
}

// countTokens counts the tokens that the answer of x has reported.
func (m *metrics) countTokens(x *exchange) {
	if !slices.Contains(x.usage.known[:], true) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	by := [2]string{visible(x.model), visible(x.key)}
	if len(m.models) < maxModelSeries {
		m.models[by[0]] = true
	} else if !m.models[by[0]] {
		by[0] = "other"
	}
	counts := m.tokens[by]
	for i, n := range x.usage.tokens {
		counts[i] += n
	}
	m.tokens[by] = counts
}

// allTokens returns the counts of tokens by model and name of the client's key.
func (m *metrics) allTokens() map[[2]string][len(tokenKinds)]int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.tokens)
}

// upstreamFailures returns how many requests failed because of Qwen or the network to it.
func (m *metrics) upstreamFailures() (n int64) {
	for i := range m.upstreamErrors {
		n += m.upstreamErrors[i].Load()
	}
	return n
}

// prometheus handles GET /metrics.
func (h *health) prometheus(x *exchange, _ *http.Request) error {
	var p page
	p.counts(h.metrics)
	p.health(h)
	p.process(h.metrics.started)
	p.runtime()
	x.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	x.Header().Set("Cache-Control", "no-store")
	x.Write(p.Bytes())
	return nil
}

// A page is a list of metric families in Prometheus' text format, version 0.0.4.
type page struct {
	bytes.Buffer
	family string // the one that the next samples belong to
}

func (p *page) begin(name, typ, help string) {
	p.family = name
	fmt.Fprintf(p, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, typ)
}

// add writes a sample of the current family. Labels are pairs of name and value.
func (p *page) add(value float64, labels ...string) { p.sample("", value, labels...) }

func (p *page) sample(suffix string, value float64, labels ...string) {
	p.WriteString(p.family + suffix)
	for i := 0; i < len(labels); i += 2 {
		fmt.Fprintf(p, "%c%s=%q", "{,"[min(i, 1)], labels[i], labels[i+1])
	}
	if len(labels) > 0 {
		p.WriteByte('}')
	}
	fmt.Fprintf(p, " %v\n", value)
}

// counter and gauge write a family with one sample.
func (p *page) counter(name, help string, value float64) {
	p.begin(name, "counter", help)
	p.add(value)
}

func (p *page) gauge(name, help string, value float64) {
	p.begin(name, "gauge", help)
	p.add(value)
}

// counts adds the counts of m. A status has a series from its first request on, and a histogram from its first observation.
// All other series exist from the start.
func (p *page) counts(m *metrics) {
	v := version()
	p.begin("qwen_proxy_build_info", "gauge", "What is running; always 1.")
	p.add(1, "version", v.Version, "commit", v.Commit, "goversion", v.Go)
	p.begin("qwen_proxy_requests_total", "counter", "Finished requests by route and HTTP status. 499 means that the client left before its answer began.")
	for _, r := range m.routes {
		for status := range r.statuses {
			if n := r.statuses[status].Load(); n > 0 || slices.Contains(alertStatuses, status) {
				p.add(float64(n), "route", r.path, "status", strconv.Itoa(status))
			}
		}
	}
	p.begin("qwen_proxy_request_duration_seconds", "histogram", "Time from a request's headers to the end of its answer or stream.")
	for _, r := range m.routes {
		p.histogram(&r.duration, r.path)
	}
	p.begin("qwen_proxy_time_to_first_byte_seconds", "histogram", "Time from a request's headers to the first byte of the body of Qwen's answer.")
	for _, r := range m.routes {
		p.histogram(&r.firstByte, r.path)
	}
	p.gauge("qwen_proxy_requests_in_flight", "Requests being answered, including this one.", float64(m.inFlight.Load()))
	p.gauge("qwen_proxy_open_streams", "Open event streams from Qwen.", float64(m.streams.Load()))
	p.counter("qwen_proxy_rate_limited_total", "Requests that the proxy's own limiter refused.", float64(m.rateLimited.Load()))
	p.counter("qwen_proxy_log_lines_dropped_total", "Log lines that the proxy dropped because nobody read the log.", float64(m.logDropped.Load()))
	p.counter("qwen_proxy_upstream_requests_total", "Requests that went to Qwen and have ended.", float64(m.upstreamRequests.Load()))
	p.counter("qwen_proxy_upstream_replays_total", "Requests that were sent to Qwen again, because the connection failed.", float64(m.replays.Load()))
	p.begin("qwen_proxy_upstream_errors_total", "counter", "Requests that failed at Qwen or on the way to it, by the log's error_type.")
	for i, category := range categories {
		p.add(float64(m.upstreamErrors[i].Load()), "category", category)
	}
	p.begin("qwen_proxy_tokens_total", "counter", "Tokens that Qwen's answers reported, by model, name of the client's key, and kind.")
	tokens := m.allTokens()
	for _, by := range slices.SortedFunc(maps.Keys(tokens), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		for i, kind := range tokenKinds {
			p.add(float64(tokens[by][i]), "model", by[0], "key", by[1], "kind", kind)
		}
	}
}

// histogram adds h. It adds nothing if h has no observations.
func (p *page) histogram(h *histogram, route string) {
	sum, counts, count := h.sum.Load(), [len(h.buckets)]int64{}, int64(0)
	for i := range h.buckets {
		count += h.buckets[i].Load()
		counts[i] = count
	}
	if count == 0 {
		return
	}
	for i, bound := range bounds {
		p.sample("_bucket", float64(counts[i]), "route", route, "le", fmt.Sprint(bound))
	}
	p.sample("_bucket", float64(count), "route", route, "le", "+Inf")
	p.sample("_sum", time.Duration(sum).Seconds(), "route", route)
	p.sample("_count", float64(count), "route", route)
}

// health adds the state of the credentials.
func (p *page) health(h *health) {
	ready := 1.0
	if h.reason() != nil {
		ready = 0
	}
	p.gauge("qwen_proxy_ready", "1 if /health/ready answers 200, else 0.", ready)
	st := h.tokens.status()
	if st.flow == nil {
		return // an API key does not expire
	}
	if t := st.token; t != nil {
		p.gauge("qwen_proxy_token_expiry_timestamp_seconds", "When the access token expires, in Unix time.", float64(t.expiry.UnixMilli())/1000)
	}
	p.begin("qwen_proxy_token_refreshes_total", "counter", "Attempts to refresh the access token. refused is final, failed is tried again.")
	for i, result := range refreshResults {
		p.add(float64(st.refreshes[i].Load()), "result", result)
	}
}

// process adds the operating system's figures for the process, under the names that Prometheus' client libraries use. On systems
// other than Linux it adds only the start time.
func (p *page) process(started time.Time) {
	p.gauge("process_start_time_seconds", "Start time of the process since unix epoch in seconds.", float64(started.UnixMilli())/1000)
	stat, _ := os.ReadFile("/proc/self/stat")
	// proc_pid_stat(5). The program's name, in parentheses, may contain blanks. Field 3 follows it.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 22 {
		return
	}
	number := func(s string) float64 {
		n, _ := strconv.ParseFloat(s, 64)
		return n
	}
	const ticks = 100 // per second: USER_HZ
	p.counter("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.", (number(fields[14-3])+number(fields[15-3]))/ticks)
	p.gauge("process_resident_memory_bytes", "Resident memory size in bytes.", number(fields[24-3])*float64(os.Getpagesize()))
	open, _ := os.ReadDir("/proc/self/fd")
	p.gauge("process_open_fds", "Number of open file descriptors.", float64(len(open)-1)) // the directory itself does not count
	limits, _ := os.ReadFile("/proc/self/limits")
	if _, limit, ok := strings.Cut(string(limits), "Max open files"); ok {
		p.gauge("process_max_fds", "Maximum number of open file descriptors.", number(strings.Fields(limit)[0]))
	}
}

// runtime adds figures of the Go runtime, under the names that Prometheus' Go client uses.
func (p *page) runtime() {
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	p.gauge("go_goroutines", "Number of goroutines that currently exist.", float64(runtime.NumGoroutine()))
	p.gauge("go_sched_gomaxprocs_threads", "GOMAXPROCS: threads that can run Go code at once.", float64(runtime.GOMAXPROCS(0)))
	p.gauge("go_memstats_heap_alloc_bytes", "Bytes of heap objects that are live or not yet swept.", float64(withoutBallast(mem.HeapAlloc)))
	p.counter("go_memstats_alloc_bytes_total", "Bytes allocated on the heap since the start, freed ones included.", float64(withoutBallast(mem.TotalAlloc)))
	p.gauge("go_memstats_next_gc_bytes", "Size of the heap at which the next garbage collection is to end.", float64(withoutBallast(mem.NextGC)))
	p.gauge("go_memstats_sys_bytes", "Bytes of memory that the runtime has from the system.", float64(withoutBallast(mem.Sys)))
	p.counter("go_gc_cycles_total_gc_cycles_total", "Garbage collections that have ended.", float64(mem.NumGC))
}
