//go:build linux

// Bench measures what qwen-go-proxy costs beside other reverse proxies, on Linux:
//
//	go run . [-quick] [-rounds n] [-duration d] [-only names] [-what names] [-upstream plain|tls1|tls2] [-svg file] [-proxy [name=]file]…
//
// It builds the qwen-go-proxy in the directory above, or takes the builds that -proxy names. Each runs with its default settings: the
// access log at info level goes to a file, and the limiter is on. Beside it run:
//
//	bare      a tuned httputil.ReverseProxy that only forwards
//	bare-2    a second copy of it
//	nginx, haproxy, caddy
//	          if they are installed, configured to keep connections open and to pass streams on at once. nginx writes an
//	          access log, the other two do not
//	direct    the load without a proxy
//
// All stand before the same upstream, which is a process of its own. All get the same load, which comes from this process over raw
// connections. Every byte of every answer is checked.
//
// The measurements (-what):
//
//	2k, 100k  CPU time per request with a body of 2 KB or 100 KB and an answer of 1 KB of JSON. Each of 32 keep-alive clients sends
//	          its next request when it has the answer. This load takes the whole machine, upstream and clients included, so the
//	          requests per second say less than the CPU time.
//	sse       CPU time per event of 200 bytes, over 64 streams with an event every 10 ms each. Also the age of events on arrival:
//	          each carries the time at which the upstream sent it, by the clock that all processes share.
//	burst     writes per event when 100 events arrive together.
//	stalled   age of events on arrival over 5,000 streams, without and with one client that does not read.
//	streams   memory per stream while 10,000 (-streams) are open and have brought events: growth over the idle process, RSS for one
//	          process, the sum of PSS for several. Afterwards each stream goes on to its end and must be complete. nginx takes
//	          most of this memory when it starts.
//	start     time from the start until GET /health is answered; for the others, until they take a connection. Also the size of the
//	          executable, and the memory 0.3 s later.
//
// CPU time is user and system time of all processes of a program. It is taken in short slices (-duration), after a warm-up of 0.3 s,
// in several rounds (-rounds). In a round the programs take turns, and every second round runs in the opposite order: whatever else keeps
// the machine busy hits all of them. A figure is the median over the rounds, with the quartiles beside it. A ratio is the
// median of the ratios within each round. It says more than the figures themselves, because what disturbs both programs cancels out. The
// programs start anew in each round. For the memory they start by themselves, in at most three rounds.
//
// The two copies of the bare proxy are the same program, so the difference between them comes from the machine. If they differ by more than
// 3 %, or if the load average at the start is above 0.5, the run says that its figures can't be believed.
//
// -svg writes a bar chart of the CPU time of a 2 KB request and of the memory of a stream.
//
// To compare two builds, use many short slices:
//
//	go run . -proxy old=/tmp/old -proxy new=/tmp/new -only bare -what 2k,sse -rounds 20 -duration 1s
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills at once
	os.Exit(command(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// command runs one of the commands and returns its exit status.
func command(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	var err error
	switch {
	case len(args) > 0 && args[0] == "upstream":
		err = upstreamMain(args[1:], stdin, stdout)
	case len(args) > 0 && args[0] == "bare":
		err = bareMain(args[1:])
	default:
		err = compare(ctx, args, stdout, stderr)
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "bench: %v\n", err)
		return 1
	}
	return 0
}

const (
	smallBody = 2 << 10 // bytes of a usual request
	largeBody = 100 << 10
	clients   = 32
	sseOpen   = 64
	sseEvery  = 10 * time.Millisecond
)

// A measurement is one of the things that are measured, and one table.
type measurement struct {
	name    string
	title   string
	columns []column
	steady  bool // two copies of one program get the same figures on a quiet machine
	// slice measures a running program once, a value a column. It is nil where it takes more than that.
	slice func(in *instance, d time.Duration) ([]float64, error)
}

// manyStreams is how many streams a client that does not read could hinder.
func manyStreams(streams int) int { return min(streams, 5000) }

func measurements(streams int) []*measurement {
	loop := func(name string, size int) *measurement {
		return &measurement{
			name:    name,
			steady:  true,
			title:   fmt.Sprintf("Requests with a body of %d KB, %d clients", size>>10, clients),
			columns: []column{{"CPU µs a request", 1}, {"requests/s", 0}, {"p50 ms", 2}, {"p99 ms", 2}},
			slice: func(in *instance, d time.Duration) ([]float64, error) {
				r, err := closedLoop(in, clients, size, d)
				if err != nil {
					return nil, err
				}
				return []float64{r.cpuEach(), float64(len(r.times)) / r.elapsed.Seconds(), quantile(r.times, 0.5) / 1e6, quantile(r.times, 0.99) / 1e6}, nil
			},
		}
	}
	return []*measurement{
		loop("2k", smallBody),
		loop("100k", largeBody),
		{
			name:    "sse",
			steady:  true,
			title:   fmt.Sprintf("Server-sent events of %d bytes, %d streams with one every %v", eventSize, sseOpen, sseEvery),
			columns: []column{{"CPU µs an event", 1}, {"events/s", 0}, {"age p50 µs", 0}, {"age p99 µs", 0}},
			slice: func(in *instance, d time.Duration) ([]float64, error) {
				r, err := openStreams(in, sseOpen, sseEvery, d)
				if err != nil {
					return nil, err
				}
				return []float64{r.cpuEach(), float64(len(r.times)) / r.elapsed.Seconds(), quantile(r.times, 0.5) / 1e3, quantile(r.times, 0.99) / 1e3}, nil
			},
		},
		{
			name:    "burst",
			title:   fmt.Sprintf("Bursts of %d events that arrive together", burstSize),
			columns: []column{{"writes an event", 3}},
			slice: func(in *instance, _ time.Duration) ([]float64, error) {
				writes, err := bursts(in)
				return []float64{writes}, err
			},
		},
		{
			name:    "stalled",
			title:   fmt.Sprintf("%d streams with an event a second, without and with one client that does not read", manyStreams(streams)),
			columns: []column{{"age p99 ms", 2}, {"with it", 2}},
			slice: func(in *instance, d time.Duration) ([]float64, error) {
				without, err := openStreams(in, manyStreams(streams), time.Second, d)
				if err != nil {
					return nil, err
				}
				end, err := stall(in)
				if err != nil {
					return nil, err
				}
				defer end()
				with, err := openStreams(in, manyStreams(streams), time.Second, d)
				if err != nil {
					return nil, err
				}
				return []float64{quantile(without.times, 0.99) / 1e6, quantile(with.times, 0.99) / 1e6}, nil
			},
		},
		{
			name:    "streams",
			steady:  true,
			title:   fmt.Sprintf("Memory with %d streams open", streams),
			columns: []column{{"kB a stream", 1}, {"idle MB", 1}, {"MB in all", 0}},
		},
		{
			name:    "start",
			title:   "Start",
			columns: []column{{"ms until it answers", 1}, {"executable MB", 1}, {"idle MB", 1}},
		},
	}
}

// A comparison is one run of the bench.
type comparison struct {
	measurements []*measurement
	programs     []*program
	rounds       int
	duration     time.Duration
	streams      int
	mode         string
	load         float64 // the load average at the start

	dir      string
	upstream *upstreamProcess
	results  results
	failures []string // what and why, in order
	stderr   io.Writer
}

// compare is the bench itself.
func compare(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	quick := flags.Bool("quick", false, "under 90 seconds: 2 rounds of 700ms and 1,000 streams, unless other flags are set")
	c := &comparison{results: results{}, stderr: stderr}
	flags.IntVar(&c.rounds, "rounds", 8, "how often everything is measured")
	flags.DurationVar(&c.duration, "duration", 2*time.Second, "length of one slice")
	flags.IntVar(&c.streams, "streams", 10_000, "streams that are open while memory is measured")
	flags.StringVar(&c.mode, "upstream", "plain", "what the upstream speaks: plain (HTTP/1.1), tls1 (HTTP/1.1 over TLS) or tls2 (HTTP/2 over TLS)")
	only := flags.String("only", "", "programs to run beside qwen-go-proxy, comma-separated: bare (with its copy), nginx, haproxy, caddy, direct")
	svg := flags.String("svg", "", "`file` to write a bar chart to")
	what := flags.String("what", "", "what to measure: 2k, 100k, sse, burst, stalled, streams, start, comma-separated")
	source := flags.String("source", "..", "directory of the qwen-go-proxy to build if there is no -proxy")
	flags.Func("proxy", "`[name=]file`, a build of qwen-go-proxy; may be repeated. The others are compared with the first", func(s string) error {
		name, file, ok := strings.Cut(s, "=")
		if !ok {
			name, file = filepath.Base(s), s
		}
		file, err := filepath.Abs(file)
		if err != nil {
			return err
		}
		if _, err := exec.LookPath(file); err != nil {
			return err
		}
		if slices.ContainsFunc(c.programs, func(p *program) bool { return p.name == name }) {
			return fmt.Errorf("there are two builds named %q: write name=file", name)
		}
		c.programs = append(c.programs, &program{name: name, file: file, ours: true, command: oursCommand})
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	set := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { set[f.Name] = true })
	if *quick {
		for name, value := range map[string]string{"rounds": "2", "duration": "700ms", "streams": "1000"} {
			if !set[name] {
				flags.Set(name, value)
			}
		}
	}
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("unknown argument %q", flags.Arg(0))
	case c.rounds < 1 || c.duration <= 0 || c.streams < 1:
		return errors.New("-rounds, -duration and -streams have to be positive")
	case c.mode != "plain" && c.mode != "tls1" && c.mode != "tls2":
		return fmt.Errorf("-upstream %s: want plain, tls1 or tls2", c.mode)
	}
	if err := c.raiseLimit(); err != nil {
		return err
	}
	var err error
	if c.measurements, err = choose(measurements(c.streams), *what, func(m *measurement) string { return m.name }); err != nil {
		return fmt.Errorf("-what: %w", err)
	}
	if c.dir, err = os.MkdirTemp("", "qwen-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(c.dir)
	if err := c.choosePrograms(*only, *source); err != nil {
		return err
	}
	if c.upstream, err = startUpstream(c.mode, c.dir, stderr); err != nil {
		return fmt.Errorf("upstream: %w", err)
	}
	defer c.upstream.stop()

	began := time.Now()
	c.load = loadAverage()
	err = c.measure(ctx)
	fmt.Fprintf(stdout, "qwen-go-proxy and others before an upstream that speaks %s: %d rounds in %v, slices of %v\n%s, %s, %d CPUs (%s), load average %.2f at the start\n",
		map[string]string{"plain": "HTTP/1.1", "tls1": "HTTP/1.1 over TLS", "tls2": "HTTP/2 over TLS"}[c.mode],
		c.rounds, time.Since(began).Round(time.Second), c.duration, began.Format(time.DateOnly), runtime.Version(), runtime.NumCPU(), processor(), c.load)
	c.report(stdout)
	if *svg != "" && err == nil {
		err = os.WriteFile(*svg, c.chart(), 0o644)
	}
	if len(c.failures) > 0 {
		err = errors.Join(err, fmt.Errorf("this failed:\n%s", strings.Join(c.failures, "\n")))
	}
	return err
}

// raiseLimit lets this process, and those that it starts, open as many files as the system allows, and bounds the streams by it.
func (c *comparison) raiseLimit() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	limit.Cur = limit.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return err
	}
	if most := (int64(min(limit.Max, math.MaxInt32)) - 200) / 2; int64(c.streams) > most { // two descriptors a stream
		fmt.Fprintf(c.stderr, "%d streams instead of %d: the hard limit of open files is %d (ulimit -Hn)\n", most, c.streams, limit.Max)
		c.streams = int(most)
	}
	return nil
}

// choose returns those of all whose names are in the comma-separated list, in all's order; all of them where it is empty.
func choose[T any](all []T, list string, name func(T) string) (chosen []T, err error) {
	if list == "" {
		return all, nil
	}
	names := strings.Split(list, ",")
	for _, v := range all {
		if i := slices.Index(names, name(v)); i >= 0 {
			chosen = append(chosen, v)
			names = slices.Delete(names, i, i+1)
		}
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("there is no %q", names[0])
	}
	return chosen, nil
}

// choosePrograms finds out what to run, and builds qwen-go-proxy where no build is given.
func (c *comparison) choosePrograms(only, source string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	all := others(self)
	given := len(c.programs) > 0
	if !given {
		all = slices.Insert(all, 0, &program{name: "qwen-go-proxy", ours: true, command: oursCommand})
	}
	if slices.Contains(strings.Split(only, ","), "bare") {
		only += ",bare-2" // the copy goes with it
	}
	if !given && only != "" && !slices.Contains(strings.Split(only, ","), "qwen-go-proxy") {
		only += ",qwen-go-proxy"
	}
	chosen, err := choose(all, only, func(p *program) string { return p.name })
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	for _, p := range chosen {
		switch {
		case p.ours:
			if p.file, err = build(source, c.dir, c.stderr); err != nil {
				return err
			}
		case p.name == direct && c.mode != "plain":
			fmt.Fprintln(c.stderr, "direct: left out, since the load speaks no TLS")
			continue
		case p.name != direct && p.file == "":
			fmt.Fprintf(c.stderr, "%s: left out, since it is not installed\n", p.name)
			continue
		}
		c.programs = append(c.programs, p)
	}
	if len(c.programs) == 0 {
		return errors.New("there is no program to run")
	}
	return nil
}

// measure takes all the figures. Its error is that of a context that ended, or of the upstream.
func (c *comparison) measure(ctx context.Context) error {
	wanted := map[string]bool{}
	for _, m := range c.measurements {
		wanted[m.name] = true
	}
	for round := range c.rounds {
		fmt.Fprintf(c.stderr, "round %d of %d\n", round+1, c.rounds)
		if err := c.round(ctx, round, wanted["start"]); err != nil {
			return err
		}
		if wanted["streams"] && round < max(1, min(3, c.rounds/2)) {
			for _, p := range c.inTurn(round) {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if p.file == "" {
					continue
				}
				c.note("streams", p, round, func() ([]float64, error) { return c.memoryOf(p) })
			}
			c.progress("streams", round)
		}
	}
	return nil
}

// inTurn returns the programs in the order of a round.
func (c *comparison) inTurn(round int) []*program {
	turn := slices.Clone(c.programs)
	if round%2 == 1 {
		slices.Reverse(turn)
	}
	return turn
}

// round starts all programs and takes a slice of each for each measurement.
func (c *comparison) round(ctx context.Context, round int, startToo bool) error {
	var running []*instance
	defer func() {
		for _, in := range running {
			in.stop()
		}
	}()
	for _, p := range c.inTurn(round) {
		in, err := p.start(c.dir, c.upstream.destination())
		if err != nil {
			c.fail(p, "start", err)
			continue
		}
		running = append(running, in)
		if startToo && p.file != "" {
			c.note("start", p, round, in.startFigures)
		}
	}
	if startToo {
		c.progress("start", round)
	}
	for _, m := range c.measurements {
		if m.slice == nil {
			continue
		}
		for _, in := range running {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			c.note(m.name, in.program, round, func() ([]float64, error) { return m.slice(in, c.duration) })
		}
		c.progress(m.name, round)
	}
	return nil
}

// note takes figures and adds them to the results, or reports what failed.
func (c *comparison) note(what string, p *program, round int, take func() ([]float64, error)) {
	values, err := take()
	if err != nil {
		c.fail(p, what, err)
	}
	if values == nil {
		return
	}
	if p.file == "" {
		values[0] = math.NaN() // nothing ran that could have used the CPU
	}
	c.results.add(what, p.name, round, values...)
}

func (c *comparison) fail(p *program, what string, err error) {
	failure := fmt.Sprintf("%s, %s: %v", p.name, what, err)
	c.failures = append(c.failures, failure)
	fmt.Fprintf(c.stderr, "  %s\n", failure)
}

// progress prints the first column of a round.
func (c *comparison) progress(what string, round int) {
	var line strings.Builder
	for _, p := range c.programs {
		if s := c.results[what][p.name]; s != nil && len(s[0]) > round && !math.IsNaN(s[0][round]) {
			fmt.Fprintf(&line, "  %s %.1f", p.name, s[0][round])
		}
	}
	fmt.Fprintf(c.stderr, "  %-7s%s\n", what, line.String())
}

// startFigures are the columns of the measurement of that name.
func (in *instance) startFigures() ([]float64, error) {
	file, err := filepath.EvalSymlinks(in.program.file)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	size := float64(info.Size()) / 1e6
	if strings.HasPrefix(in.program.name, "bare") {
		size = math.NaN() // the bench is in the same file
	}
	idle, err := memory(in.pids)
	return []float64{in.startup.Seconds() * 1e3, size, float64(idle) / 1e6}, err
}

// memoryOf measures the memory that streams take in a new process of p.
func (c *comparison) memoryOf(p *program) ([]float64, error) {
	in, err := p.start(c.dir, c.upstream.destination())
	if err != nil {
		return nil, err
	}
	defer in.stop()
	idle, err := memory(in.pids)
	if err != nil {
		return nil, err
	}
	var full int64
	err = holdStreams(in.addr, c.streams, func() (err error) {
		full, err = memory(in.pids)
		return err
	}, c.upstream.release)
	if full == 0 {
		return nil, err
	}
	// Streams that failed are reported beside the figures: a few hardly change those.
	return []float64{float64(full-idle) / 1e3 / float64(c.streams), float64(idle) / 1e6, float64(full) / 1e6}, err
}

// report prints the tables.
func (c *comparison) report(w io.Writer) {
	var names, builds, bases []string
	for _, p := range c.programs {
		names = append(names, p.name)
		if p.ours {
			builds = append(builds, p.name)
		}
		if p.name == "bare" {
			bases = append(bases, p.name)
		}
	}
	if len(builds) > 1 {
		bases = append(bases, builds[0])
	}
	fmt.Fprintf(w, "%s\n", c.trust())
	for _, m := range c.measurements {
		c.results.table(w, m, names, bases)
	}
}

const (
	maxLoad = 0.5  // load average at the start of a run that can be believed
	maxOff  = 0.03 // how far the two copies of the bare proxy may be apart
)

// trust says whether the run's figures can be believed, and why not.
func (c *comparison) trust() string {
	var why, ratios []string
	if c.load > maxLoad {
		why = append(why, fmt.Sprintf("the load average at the start was %.2f, more than %.1f", c.load, maxLoad))
	}
	for _, m := range c.measurements {
		bare, again := c.results[m.name]["bare"], c.results[m.name]["bare-2"]
		if !m.steady || bare == nil || again == nil {
			continue
		}
		ratio := again[0].over(bare[0]).spread().median
		ratios = append(ratios, fmt.Sprintf("%s %.3f", m.name, ratio))
		if !(math.Abs(ratio-1) <= maxOff) { // NaN is off too
			why = append(why, fmt.Sprintf("the two copies of the bare proxy differ by more than %.0f %% in %s", 100*maxOff, m.name))
		}
	}
	text := "The bare proxy against its copy: " + strings.Join(ratios, ", ")
	if len(ratios) == 0 {
		why = append(why, "the bare proxy did not run")
		text = "The bare proxy was not compared with a copy"
	}
	if len(why) == 0 {
		return text + ". The figures can be believed."
	}
	return text + ".\nUNRELIABLE: " + strings.Join(why, "; ") + ". Run it again on an idle machine."
}

// loadAverage returns the load average of the last minute.
func loadAverage() float64 {
	text, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(text), " ")
	load, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return math.Inf(1) // what is not known can't be believed
	}
	return load
}

// processor returns the name of the machine's processor, as far as it is known.
func processor() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// An upstreamProcess is the upstream in a process of its own.
type upstreamProcess struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	mode  string
	port  string
	ca    string
	used  int // addresses handed out
}

func startUpstream(mode, dir string, stderr io.Writer) (*upstreamProcess, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	u := &upstreamProcess{mode: mode}
	if mode != "plain" {
		u.ca = filepath.Join(dir, "ca.pem")
	}
	u.cmd = exec.Command(self, "upstream", "-mode", mode, "-ca", u.ca, "-addresses", strconv.Itoa(upstreamAddresses))
	u.cmd.Stderr = stderr
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if u.stdin, err = u.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := u.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := u.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		u.stop()
		return nil, err
	}
	u.port = strings.TrimSpace(line)
	return u, nil
}

// upstreamAddresses is how many addresses the upstream has, 127.0.0.1 and up.
const upstreamAddresses = 250

// destination returns the next of the upstream's addresses.
func (u *upstreamProcess) destination() *destination {
	u.used++
	return &destination{mode: u.mode, addr: fmt.Sprintf("127.0.0.%d:%s", u.used%upstreamAddresses+1, u.port), ca: u.ca}
}

// release lets the streams that hold go on.
func (u *upstreamProcess) release() error {
	_, err := io.WriteString(u.stdin, "\n")
	return err
}

// stop ends the process: it ends with its standard input.
func (u *upstreamProcess) stop() {
	u.stdin.Close()
	u.cmd.Wait()
}
