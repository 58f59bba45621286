//go:build linux

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httputil"
	"slices"
	"strconv"
	"sync/atomic"
	"time"
)

// warmUp is how long a load runs before it is measured.
const warmUp = 300 * time.Millisecond

// patience bounds what a load takes beyond the time it is meant to.
const patience = time.Minute

// A window is the part of a load that counts.
type window struct {
	phase   atomic.Int32 // 0 before it, 1 in it, 2 behind it
	elapsed time.Duration
	cpu     time.Duration // of the program under load
}

func (w *window) counts() bool { return w.phase.Load() == 1 }

// open lets the load warm up, and measures it for d.
func (w *window) open(pids []int, d time.Duration) error {
	time.Sleep(warmUp)
	defer w.phase.Store(2)
	before, err := cpuTime(pids)
	if err != nil {
		return err
	}
	start := time.Now()
	w.phase.Store(1)
	time.Sleep(d)
	after, err := cpuTime(pids)
	w.phase.Store(2)
	w.elapsed, w.cpu = time.Since(start), after-before
	return err
}

// A loadResult is what came of a load within its window.
type loadResult struct {
	elapsed time.Duration
	cpu     time.Duration
	times   []time.Duration // sorted: of each request how long it took, of each event how old it arrived
}

func (r *loadResult) cpuEach() float64 {
	return float64(r.cpu.Nanoseconds()) / 1000 / float64(len(r.times))
}

// run lets clients clients at work in parallel for a window, and puts their results together. A client returns its times when it
// is done, or the window's phase is 2.
func run(pids []int, d time.Duration, clients int, client func(i int, w *window) ([]time.Duration, error)) (*loadResult, error) {
	type result struct {
		times []time.Duration
		err   error
	}
	w := &window{}
	results := make(chan result, clients)
	for i := range clients {
		go func() {
			times, err := client(i, w)
			results <- result{times, err}
		}()
	}
	err := w.open(pids, d)
	all := &loadResult{elapsed: w.elapsed, cpu: w.cpu}
	for range clients {
		r := <-results
		all.times = append(all.times, r.times...)
		err = errors.Join(err, r.err)
	}
	if err == nil && len(all.times) == 0 {
		err = errors.New("nothing came through within the window")
	}
	slices.Sort(all.times)
	return all, first(err)
}

// first returns the first of the errors that Join put together: all clients tend to say the same.
func first(err error) error {
	for {
		joined, ok := err.(interface{ Unwrap() []error })
		if !ok {
			return err
		}
		err = joined.Unwrap()[0]
	}
}

// closedLoop sends req over each of clients keep-alive connections, again as soon as the answer has come.
func closedLoop(in *instance, clients int, size int, d time.Duration) (*loadResult, error) {
	req := request(in.addr, size, spec{})
	return run(in.pids, d, clients, func(_ int, w *window) ([]time.Duration, error) {
		conn, br, err := dial(in.addr, d+patience)
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		times := make([]time.Duration, 0, 1<<12)
		buf := make([]byte, len(answerBody)+1)
		for w.phase.Load() < 2 {
			start := time.Now()
			if _, err := conn.Write(req); err != nil {
				return nil, err
			}
			h, err := readHead(br)
			if err == nil {
				err = readWhole(br, h, answerBody, buf)
			}
			if err != nil {
				return nil, fmt.Errorf("answer: %w", err)
			}
			if w.counts() {
				times = append(times, time.Since(start))
			}
		}
		return times, nil
	})
}

// dial returns a connection on which all has to be done within timeout.
func dial(addr string, timeout time.Duration) (net.Conn, *bufio.Reader, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, nil, err
	}
	conn.SetDeadline(time.Now().Add(timeout))
	return conn, bufio.NewReaderSize(conn, 4<<10), nil
}

// openStreams reads streams streams whose events are every apart, begun evenly over that time.
func openStreams(in *instance, streams int, every, d time.Duration) (*loadResult, error) {
	s := spec{chunks: int((warmUp+d+100*time.Millisecond)/every) + 1, every: every}
	req := request(in.addr, smallBody, s)
	return run(in.pids, d, streams, func(i int, w *window) ([]time.Duration, error) {
		time.Sleep(every * time.Duration(i) / time.Duration(streams))
		times := make([]time.Duration, 0, s.chunks)
		err := readStream(in.addr, req, s, func(_ int, age time.Duration) {
			if w.counts() {
				times = append(times, age)
			}
		})
		return times, err
	})
}

// burstSize is how many events arrive together in a burst.
const burstSize = 100

// bursts reads a stream whose events come in bursts, and returns in how many chunks an event arrived: the writes of the program.
func bursts(in *instance) (float64, error) {
	s := spec{chunks: 10 * burstSize, every: 20 * time.Millisecond, burst: burstSize}
	conn, br, err := dial(in.addr, patience)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if _, err := conn.Write(request(in.addr, smallBody, s)); err != nil {
		return 0, err
	}
	if h, err := readHead(br); err != nil || h.status != 200 || !h.chunked {
		return 0, fmt.Errorf("no chunked stream but status %d: %w", h.status, err)
	}
	for chunks := 0; ; chunks++ {
		line, err := br.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		size, err := strconv.ParseInt(string(bytes.TrimSpace(line)), 16, 32)
		if err != nil {
			return 0, fmt.Errorf("a chunk of size %q", line)
		}
		if size == 0 {
			return float64(chunks) / float64(s.chunks), nil
		}
		if _, err := br.Discard(int(size) + len("\r\n")); err != nil {
			return 0, err
		}
	}
}

// stall opens a stream through in and reads nothing of it until the returned function is called.
func stall(in *instance) (end func(), err error) {
	conn, _, err := dial(in.addr, patience)
	if err != nil {
		return nil, err
	}
	conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	_, err = conn.Write(request(in.addr, smallBody, spec{chunks: 1 << 20, every: time.Millisecond, burst: burstSize}))
	return func() { conn.Close() }, err
}

// readStream sends req and reads the stream that answers it, of which every byte has to be as the upstream sent it. It calls arrived
// for each event, with its number and how long ago it was sent.
func readStream(addr string, req []byte, s spec, arrived func(k int, age time.Duration)) error {
	conn, br, err := dial(addr, time.Duration(s.chunks)*s.every+patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write(req); err != nil {
		return err
	}
	h, err := readHead(br)
	if err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	if h.status != 200 {
		return readWhole(br, h, nil, nil)
	}
	body := io.Reader(br)
	if h.chunked {
		body = httputil.NewChunkedReader(br)
	}
	event, scratch := make([]byte, eventSize), make([]byte, 0, eventSize)
	for k := range s.chunks {
		if err := readEvent(body, event); err != nil {
			return fmt.Errorf("event %d of %d: %w", k, s.chunks, err)
		}
		now := monotonic()
		sent, err := checkEvent(event, k, scratch)
		if err != nil {
			return err
		}
		arrived(k, now-sent)
	}
	rest, err := io.ReadAll(body)
	if err == nil && h.chunked {
		err = endOfChunks(br)
	}
	if err != nil {
		return fmt.Errorf("end of the stream: %w", err)
	}
	if string(rest) != doneEvent {
		return fmt.Errorf("the stream ends with %q", rest)
	}
	return nil
}

// holdStreams opens streams streams, and calls held when each has brought half of its events and waits. It calls release, which lets
// them go on, and reads them to their ends. The error says how many failed, and why the first one.
func holdStreams(addr string, streams int, held, release func() error) error {
	const opening = 64 // at a time, so that no listener's backlog overflows
	s := spec{chunks: 8, every: 20 * time.Millisecond, hold: true}
	req := request(addr, smallBody, s)
	slots := make(chan struct{}, opening)
	half := make(chan struct{}, streams) // a stream each, when it has brought half or has failed
	ended := make(chan error, streams)
	go func() {
		for range streams {
			slots <- struct{}{}
			go func() {
				opened, halved := false, false
				open := func() {
					if !opened {
						opened = true
						<-slots
					}
				}
				halve := func() {
					if !halved {
						halved = true
						half <- struct{}{}
					}
				}
				err := readStream(addr, req, s, func(k int, _ time.Duration) {
					open()
					if k == s.chunks/2-1 {
						halve()
					}
				})
				open()
				halve()
				ended <- err
			}()
		}
	}()
	for range streams {
		<-half
	}
	if err := errors.Join(held(), release()); err != nil {
		return err
	}
	failed := 0
	var why error
	for range streams {
		if err := <-ended; err != nil {
			failed++
			why = cmp.Or(why, err)
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d streams were cut or changed: %w", failed, streams, why)
	}
	return nil
}
