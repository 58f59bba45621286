package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"runtime"
	runtimemetrics "runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// metrics are the server's counts since its start, for /metrics and /health/detailed. The zero value counts from zero. It is
// safe for concurrent use once every route is registered. Counting a request takes a few atomic additions and one map look-up,
// no lock and no allocation.
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

	routes   []*routeCounts          // the registered routes
	patterns map[string]*routeCounts // the same by their patterns
	other    routeCounts             // for requests that match no route, or were refused before routing
}

// categories are the values of the category label: the types of errors that Qwen or the network to it can cause.
var categories = [...]string{typeAuthentication, typeConfiguration, typeInvalidRequest, typeNetwork, typeRateLimit, typeServer, typeStreaming}

// A routeCounts counts the finished requests of one route.
type routeCounts struct {
	path      string
	statuses  [len(statusLabels)]atomic.Int64
	duration  histogram // until the answer's end
	firstByte histogram // until the first byte of Qwen's answer; requests without one are not counted
}

// statusLabels are the values of the status label: first the classes, each at the index of its digit, then the statuses with a
// label of their own. Qwen may answer with any 4xx or 5xx; the fixed list bounds the number of series.
var statusLabels = [...]string{"other", "1xx", "2xx", "3xx", "4xx", "5xx",
	"204", "400", "401", "402", "403", "404", "405", "408", "409", "413", "422", "429",
	"499", // the client left before its answer began
	"200", "500", "502", "503", "504"}

// fromTheStart is how many of statusLabels, counted from the end, have a series before the first request. A rate does not see a
// new series appear, and alerts have to see the first failures.
const fromTheStart = 5

// statusIndex has the index into statusLabels of each status below 600.
var statusIndex = func() (index [600]uint8) {
	for status := range index {
		i := slices.Index(statusLabels[:], strconv.Itoa(status))
		if i < 0 {
			i = status / 100
		}
		index[status] = uint8(i)
	}
	return index
}()

// bounds are the upper bounds of the histograms' buckets. The proxy's own errors take milliseconds, long answers take minutes.
var bounds = [...]time.Duration{
	5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second, 20 * time.Second, 30 * time.Second, time.Minute,
	2 * time.Minute, 5 * time.Minute, 10 * time.Minute,
}

// firstByteBounds is how many of bounds the time to the first byte uses: those up to a minute.
const firstByteBounds = len(bounds) - 3

// A histogram counts durations. Its buckets are not cumulative; the page adds them up.
type histogram struct {
	buckets [len(bounds) + 1]atomic.Int64 // the last counts durations above all bounds
	sum     atomic.Int64                  // in ns
}

func (h *histogram) observe(d time.Duration) {
	i := 0
	for i < len(bounds) && d > bounds[i] {
		i++
	}
	h.buckets[i].Add(1)
	h.sum.Add(int64(d))
}

// register makes the counts for the route of path, which has these patterns. It must be called before requests are served.
func (m *metrics) register(path string, patterns []string) {
	if m.patterns == nil {
		m.patterns = map[string]*routeCounts{}
	}
	counts := &routeCounts{path: path}
	m.routes = append(m.routes, counts)
	for _, pattern := range patterns {
		m.patterns[pattern] = counts
	}
}

// ended counts x, which took this long, for the route of pattern. "" means that no route matched.
func (m *metrics) ended(x *exchange, pattern string, took time.Duration) {
	counts := m.patterns[pattern]
	if counts == nil {
		counts = &m.other
	}
	i := uint8(0)
	if status := x.outcome(); status >= 0 && status < len(statusIndex) {
		i = statusIndex[status]
	}
	counts.statuses[i].Add(1)
	counts.duration.observe(took)
	if !x.firstByte.IsZero() {
		counts.firstByte.observe(x.firstByte.Sub(x.start))
	}
	if x.err != nil && x.err.code == codeRateLimit {
		m.rateLimited.Add(1)
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

// upstreamFailures returns how many requests failed because of Qwen or the network to it.
func (m *metrics) upstreamFailures() (n int64) {
	for i := range m.upstreamErrors {
		n += m.upstreamErrors[i].Load()
	}
	return n
}

// prometheus handles GET /metrics.
func (h *health) prometheus(x *exchange, _ *http.Request) error {
	p := page{b: make([]byte, 0, 32<<10)}
	p.server(h.metrics)
	p.health(h)
	p.process(h.metrics.started)
	p.runtime()
	x.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	x.Header().Set("Cache-Control", "no-store")
	x.Write(p.b)
	return nil
}

// A page is a list of metric families in Prometheus' text format, version 0.0.4.
type page struct {
	b      []byte
	family string // the one that the next samples belong to
}

func (p *page) begin(name, typ, help string) {
	p.family = name
	p.b = fmt.Appendf(p.b, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, typ)
}

// add writes a sample of the current family. Labels are pairs of name and value.
func (p *page) add(value float64, labels ...string) { p.sample("", value, labels...) }

// single writes a family with one sample.
func (p *page) single(name, typ, help string, value float64) {
	p.begin(name, typ, help)
	p.add(value)
}

var labelEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func (p *page) sample(suffix string, value float64, labels ...string) {
	p.b = append(append(p.b, p.family...), suffix...)
	for i := 0; i < len(labels); i += 2 {
		p.b = append(p.b, "{,"[min(i, 1)])
		p.b = append(append(p.b, labels[i]...), `="`...)
		p.b = append(append(p.b, labelEscaper.Replace(labels[i+1])...), '"')
	}
	if len(labels) > 0 {
		p.b = append(p.b, '}')
	}
	p.b = append(strconv.AppendFloat(append(p.b, ' '), value, 'g', -1, 64), '\n')
}

// server adds the counts of m. Most statuses have a series from their first request on, and histograms from their first
// observation. All other series exist from the start.
func (p *page) server(m *metrics) {
	v := version()
	p.begin("qwen_proxy_build_info", "gauge", "What is running; always 1.")
	p.add(1, "version", v.Version, "commit", v.Commit, "goversion", v.Go)

	routes := slices.Concat(m.routes, []*routeCounts{&m.other})
	label := func(r *routeCounts) string {
		if r == &m.other {
			return "other"
		}
		return r.path
	}
	p.begin("qwen_proxy_requests_total", "counter", "Finished requests by route and HTTP status. 499 means that the client left before its answer began.")
	for _, r := range routes {
		for i := range r.statuses {
			if n := r.statuses[i].Load(); n > 0 || i >= len(statusLabels)-fromTheStart {
				p.add(float64(n), "route", label(r), "status", statusLabels[i])
			}
		}
	}
	p.begin("qwen_proxy_request_duration_seconds", "histogram", "Time from a request's headers to the end of its answer or stream.")
	for _, r := range routes {
		p.histogram(&r.duration, len(bounds), label(r))
	}
	p.begin("qwen_proxy_time_to_first_byte_seconds", "histogram", "Time from a request's headers to the first byte of the body of Qwen's answer.")
	for _, r := range routes {
		p.histogram(&r.firstByte, firstByteBounds, label(r))
	}
	p.single("qwen_proxy_requests_in_flight", "gauge", "Requests being answered, including this one.", float64(m.inFlight.Load()))
	p.single("qwen_proxy_open_streams", "gauge", "Open event streams from Qwen.", float64(m.streams.Load()))
	p.single("qwen_proxy_rate_limited_total", "counter", "Requests that the proxy's own limiter refused.", float64(m.rateLimited.Load()))
	p.single("qwen_proxy_log_lines_dropped_total", "counter", "Log lines that the proxy dropped because nobody read the log.", float64(m.logDropped.Load()))
	p.single("qwen_proxy_upstream_requests_total", "counter", "Requests that went to Qwen, and have ended.", float64(m.upstreamRequests.Load()))
	p.single("qwen_proxy_upstream_replays_total", "counter", "Requests that were sent to Qwen again, because the connection failed.", float64(m.replays.Load()))
	p.begin("qwen_proxy_upstream_errors_total", "counter", "Those of them that failed at Qwen or on the way to it, by the error_type that the log has.")
	for i, category := range categories {
		p.add(float64(m.upstreamErrors[i].Load()), "category", category)
	}
}

// histogram adds h with its first n bounds. It adds nothing if h has no observations.
func (p *page) histogram(h *histogram, n int, route string) {
	sum, count := h.sum.Load(), int64(0)
	var upTo [len(bounds) + 1]int64
	for i := range h.buckets {
		count += h.buckets[i].Load()
		upTo[i] = count
	}
	if count == 0 {
		return
	}
	for i, bound := range bounds[:n] {
		p.sample("_bucket", float64(upTo[i]), "route", route, "le", strconv.FormatFloat(bound.Seconds(), 'g', -1, 64))
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
	p.single("qwen_proxy_ready", "gauge", "1 if /health/ready answers 200, else 0.", ready)
	if h.tokens.keyed() {
		return // an API key does not expire
	}
	if t := h.tokens.state.Load().token; t != nil && !t.expiry.IsZero() {
		p.single("qwen_proxy_token_expiry_timestamp_seconds", "gauge", "When the access token expires, in Unix time.", float64(t.expiry.UnixMilli())/1000)
	}
	p.begin("qwen_proxy_token_refreshes_total", "counter", "Attempts to refresh the access token. refused is final, failed is tried again.")
	for i, result := range refreshResults {
		p.add(float64(h.tokens.refreshes[i].Load()), "result", result)
	}
}

// process adds the operating system's figures for the process, under the names that Prometheus' client libraries use. On systems
// other than Linux it adds only the start time.
func (p *page) process(started time.Time) {
	p.single("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", float64(started.UnixMilli())/1000)
	if runtime.GOOS != "linux" {
		return
	}
	if stat, err := os.ReadFile("/proc/self/stat"); err == nil {
		// proc_pid_stat(5). The program's name, in parentheses, may contain blanks. Field 3 follows it.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		number := func(field int) float64 {
			if field-3 >= len(fields) {
				return 0
			}
			n, _ := strconv.ParseFloat(string(fields[field-3]), 64)
			return n
		}
		const ticks = 100 // per second: USER_HZ
		p.single("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", (number(14)+number(15))/ticks)
		p.single("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", number(23))
		p.single("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", number(24)*float64(os.Getpagesize()))
	}
	if dir, err := os.Open("/proc/self/fd"); err == nil {
		names, _ := dir.Readdirnames(-1)
		dir.Close()
		p.single("process_open_fds", "gauge", "Number of open file descriptors.", float64(len(names)-1)) // dir itself does not count
	}
	if limits, err := os.ReadFile("/proc/self/limits"); err == nil {
		_, line, _ := strings.Cut(string(limits), "Max open files")
		if fields := strings.Fields(line); len(fields) > 0 {
			if n, err := strconv.ParseFloat(fields[0], 64); err == nil {
				p.single("process_max_fds", "gauge", "Maximum number of open file descriptors.", n)
			}
		}
	}
}

// runtimeFamilies are the Go runtime's metrics, under the names that Prometheus' Go client uses.
var runtimeFamilies = [...]struct {
	source, name, typ, help string
	ballast                 bool // the runtime's figure includes the ballast, and ours does not
}{
	{"/sched/goroutines:goroutines", "go_goroutines", "gauge", "Number of goroutines that currently exist.", false},
	{"/sched/threads/total:threads", "go_threads", "gauge", "Number of OS threads that the runtime has.", false},
	{"/sched/gomaxprocs:threads", "go_sched_gomaxprocs_threads", "gauge", "GOMAXPROCS: threads that can run Go code at once.", false},
	{"/memory/classes/heap/objects:bytes", "go_memstats_heap_alloc_bytes", "gauge", "Bytes of heap objects that are live or not yet swept.", true},
	{"/memory/classes/heap/stacks:bytes", "go_memstats_stack_inuse_bytes", "gauge", "Bytes of goroutines' stacks.", false},
	{"/gc/heap/allocs:bytes", "go_memstats_alloc_bytes_total", "counter", "Bytes allocated on the heap since the start, freed ones included.", true},
	{"/gc/heap/goal:bytes", "go_memstats_next_gc_bytes", "gauge", "Size of the heap at which the next garbage collection is to end.", true},
	{"/memory/classes/total:bytes", "go_memstats_sys_bytes", "gauge", "Bytes of memory that the runtime has from the system.", true},
	{"/gc/gomemlimit:bytes", "go_gc_gomemlimit_bytes", "gauge", "GOMEMLIMIT, or the largest number if it is not set.", false},
	{"/gc/cycles/total:gc-cycles", "go_gc_cycles_total_gc_cycles_total", "counter", "Garbage collections that have ended.", false},
}

// runtime adds the Go runtime's metrics.
func (p *page) runtime() {
	p.begin("go_info", "gauge", "The version of Go; always 1.")
	p.add(1, "version", runtime.Version())
	var samples [len(runtimeFamilies)]runtimemetrics.Sample
	for i := range samples {
		samples[i].Name = runtimeFamilies[i].source
	}
	runtimemetrics.Read(samples[:])
	for i, f := range runtimeFamilies {
		if samples[i].Value.Kind() == runtimemetrics.KindUint64 { // another kind if this Go version does not know the metric
			value := samples[i].Value.Uint64()
			if f.ballast {
				value = withoutBallast(value)
			}
			p.single(f.name, f.typ, f.help, float64(value))
		}
	}
}
