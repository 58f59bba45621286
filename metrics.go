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

// metrics are what the server has counted since its start, for /metrics and /health/detailed. The zero value counts from
// zero. It is safe for concurrent use once every route is there, and to count costs a request a handful of atomic
// additions and one look-up: no lock, no allocation.
type metrics struct {
	started     time.Time
	requests    atomic.Int64 // begun
	inFlight    atomic.Int64 // now
	streams     atomic.Int64 // open now
	rateLimited atomic.Int64
	logDropped  atomic.Int64 // lines

	upstreamRequests atomic.Int64 // sent to Qwen, and ended
	replays          atomic.Int64 // of those, sent once more because the connection failed
	upstreamErrors   [len(categories)]atomic.Int64

	routes   []*routeCounts          // those that are registered
	patterns map[string]*routeCounts // the same by their patterns
	other    routeCounts             // of requests that match none, or were turned away before one was looked for
}

// categories are the values of the category label: the types of errors that Qwen, or the way to it, can be the cause of.
var categories = [...]string{typeAuthentication, typeConfiguration, typeInvalidRequest, typeNetwork, typeRateLimit, typeServer, typeStreaming}

// A routeCounts counts the requests of one route that have ended.
type routeCounts struct {
	path      string
	statuses  [len(statusLabels)]atomic.Int64
	duration  histogram // until the answer's end
	firstByte histogram // until the first byte of Qwen's answer; without those that brought none
}

// statusLabels are the values of the status label: a class of statuses at its own digit, then those that are told
// apart. Qwen may answer with any 4xx or 5xx, and what it does shall not decide how many series there are.
var statusLabels = [...]string{"other", "1xx", "2xx", "3xx", "4xx", "5xx",
	"204", "400", "401", "402", "403", "404", "405", "408", "409", "413", "422", "429",
	"499", // the client left before its answer began
	"200", "500", "502", "503", "504"}

// fromTheStart is how many of statusLabels, the last ones, have a series before the first request. A rate doesn't see the
// step from no series to one, and alerts shall see the first failures.
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

// bounds are the upper bounds of the histograms' buckets: errors of our own take milliseconds, long answers minutes.
var bounds = [...]time.Duration{
	5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second, 20 * time.Second, 30 * time.Second, time.Minute,
	2 * time.Minute, 5 * time.Minute, 10 * time.Minute,
}

// firstByteBounds is how many of bounds the time to the first byte has: up to a minute.
const firstByteBounds = len(bounds) - 3

// A histogram counts durations. Its buckets are apart; a page adds them up.
type histogram struct {
	buckets [len(bounds) + 1]atomic.Int64 // the last is for what is longer than all bounds
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

// register makes counts for the route of path, which has these patterns. It must not be called any more once requests are
// served.
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

// ended counts x, which took this long, for the route of pattern; "" where none has matched.
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

// upstreamFailures returns how many requests failed at Qwen or on the way to it.
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

// A page is in Prometheus' text format, version 0.0.4: families of samples.
type page struct {
	b      []byte
	family string // of the samples that come next
}

func (p *page) begin(name, typ, help string) {
	p.family = name
	p.b = fmt.Appendf(p.b, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, typ)
}

// add writes a sample of the family. Labels are pairs of name and value.
func (p *page) add(value float64, labels ...string) { p.sample("", value, labels...) }

// single writes a family of one sample.
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

// server adds what m has counted. Most statuses have a series from their first request on, and histograms from their
// first observation; all else is there from the start.
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
	p.begin("qwen_proxy_requests_total", "counter", "Requests that have ended, by route and HTTP status; 499 is a client that left before its answer began.")
	for _, r := range routes {
		for i := range r.statuses {
			if n := r.statuses[i].Load(); n > 0 || i >= len(statusLabels)-fromTheStart {
				p.add(float64(n), "route", label(r), "status", statusLabels[i])
			}
		}
	}
	p.begin("qwen_proxy_request_duration_seconds", "histogram", "Time from a request's headers to the end of its answer, that of a stream included.")
	for _, r := range routes {
		p.histogram(&r.duration, len(bounds), label(r))
	}
	p.begin("qwen_proxy_time_to_first_byte_seconds", "histogram", "Time from a request's headers to the first byte of the body of Qwen's answer.")
	for _, r := range routes {
		p.histogram(&r.firstByte, firstByteBounds, label(r))
	}
	p.single("qwen_proxy_requests_in_flight", "gauge", "Requests being answered, this one included.", float64(m.inFlight.Load()))
	p.single("qwen_proxy_open_streams", "gauge", "Event streams of Qwen's that are open.", float64(m.streams.Load()))
	p.single("qwen_proxy_rate_limited_total", "counter", "Requests that the proxy's own limiter refused.", float64(m.rateLimited.Load()))
	p.single("qwen_proxy_log_lines_dropped_total", "counter", "Log lines that the proxy dropped because nobody read the log.", float64(m.logDropped.Load()))
	p.single("qwen_proxy_upstream_requests_total", "counter", "Requests that went to Qwen, and have ended.", float64(m.upstreamRequests.Load()))
	p.single("qwen_proxy_upstream_replays_total", "counter", "Requests that were sent to Qwen again, because the connection failed.", float64(m.replays.Load()))
	p.begin("qwen_proxy_upstream_errors_total", "counter", "Those of them that failed at Qwen or on the way to it, by the error_type that the log has.")
	for i, category := range categories {
		p.add(float64(m.upstreamErrors[i].Load()), "category", category)
	}
}

// histogram adds h with its first n bounds, where it has counted anything.
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

// health adds how the credentials are.
func (p *page) health(h *health) {
	ready := 1.0
	if h.reason() != nil {
		ready = 0
	}
	p.single("qwen_proxy_ready", "gauge", "1 where /health/ready says 200, else 0.", ready)
	if h.tokens.keyed() {
		return // an API key neither expires nor is renewed
	}
	if t := h.tokens.state.Load().token; t != nil && !t.expiry.IsZero() {
		p.single("qwen_proxy_token_expiry_timestamp_seconds", "gauge", "When the access token expires, in Unix time.", float64(t.expiry.UnixMilli())/1000)
	}
	p.begin("qwen_proxy_token_refreshes_total", "counter", "Attempts to renew the access token: refused is Qwen's last word, and what failed is tried again.")
	for i, result := range refreshResults {
		p.add(float64(h.tokens.refreshes[i].Load()), "result", result)
	}
}

// process adds what the operating system knows of the process, under the names that Prometheus' own clients give it. All
// but the start is there on Linux alone.
func (p *page) process(started time.Time) {
	p.single("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", float64(started.UnixMilli())/1000)
	if runtime.GOOS != "linux" {
		return
	}
	if stat, err := os.ReadFile("/proc/self/stat"); err == nil {
		// proc_pid_stat(5). The program's name, in parentheses, may hold blanks; field 3 comes behind it.
		fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
		number := func(field int) float64 {
			if field-3 >= len(fields) {
				return 0
			}
			n, _ := strconv.ParseFloat(string(fields[field-3]), 64)
			return n
		}
		const ticks = 100 // a second: USER_HZ
		p.single("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", (number(14)+number(15))/ticks)
		p.single("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", number(23))
		p.single("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", number(24)*float64(os.Getpagesize()))
	}
	if dir, err := os.Open("/proc/self/fd"); err == nil {
		names, _ := dir.Readdirnames(-1)
		dir.Close()
		p.single("process_open_fds", "gauge", "Number of open file descriptors.", float64(len(names)-1)) // without dir
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

// runtimeFamilies are those of the Go runtime, under the names that Prometheus' Go client gives them.
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
	{"/gc/gomemlimit:bytes", "go_gc_gomemlimit_bytes", "gauge", "GOMEMLIMIT, or the largest number where there is none.", false},
	{"/gc/cycles/total:gc-cycles", "go_gc_cycles_total_gc_cycles_total", "counter", "Garbage collections that have ended.", false},
}

// runtime adds how the Go runtime is.
func (p *page) runtime() {
	p.begin("go_info", "gauge", "The version of Go; always 1.")
	p.add(1, "version", runtime.Version())
	var samples [len(runtimeFamilies)]runtimemetrics.Sample
	for i := range samples {
		samples[i].Name = runtimeFamilies[i].source
	}
	runtimemetrics.Read(samples[:])
	for i, f := range runtimeFamilies {
		if samples[i].Value.Kind() == runtimemetrics.KindUint64 { // another where this Go doesn't know it
			value := samples[i].Value.Uint64()
			if f.ballast {
				value = withoutBallast(value)
			}
			p.single(f.name, f.typ, f.help, float64(value))
		}
	}
}
