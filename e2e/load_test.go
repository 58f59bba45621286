package e2e

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// atOnce calls f n times, some of them at one time.
func atOnce(n int, f func()) {
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 50 {
		wg.Go(func() {
			for next.Add(1) <= int64(n) {
				f()
			}
		})
	}
	wg.Wait()
}

// A footprint is what a process takes of the machine.
type footprint struct {
	goroutines, descriptors int
	inFlight                int // requests, without the one that asks
	resident, heap          int // bytes
}

func (p *program) footprint() (u footprint) {
	p.t.Helper()
	if runtime.GOOS != "linux" {
		p.t.Skip("needs /proc")
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	res, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Get(p.url + "/health/detailed")
	fatalIf(p.t, err)
	defer res.Body.Close()
	var detailed struct {
		Goroutines int
		Requests   struct {
			InFlight int `json:"in_flight"`
		}
		Memory struct {
			Heap int `json:"heap_bytes"`
		}
	}
	fatalIf(p.t, json.NewDecoder(res.Body).Decode(&detailed))
	proc := fmt.Sprintf("/proc/%d/", p.cmd.Process.Pid)
	descriptors, err := os.ReadDir(proc + "fd")
	fatalIf(p.t, err)
	status, err := os.ReadFile(proc + "status")
	fatalIf(p.t, err)
	if _, after, ok := strings.Cut(string(status), "\nVmRSS:"); !ok {
		p.t.Fatalf("no VmRSS in %s", status)
	} else if _, err := fmt.Sscanf(after, "%d kB", &u.resident); err != nil {
		p.t.Fatal(err)
	}
	u.resident <<= 10
	u.goroutines, u.heap, u.inFlight, u.descriptors = detailed.Goroutines, detailed.Memory.Heap, detailed.Requests.InFlight-1, len(descriptors)
	return u
}

// until returns p's footprint once it is as wanted, or fails the test.
func (p *program) until(what string, wanted func(footprint) bool) footprint {
	p.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		u := p.footprint()
		if wanted(u) {
			return u
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%+v, want %s", u, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestAnnouncementsTakeNoMemory: memory goes by what has come, never by what is said to come.
func TestAnnouncementsTakeNoMemory(t *testing.T) {
	t.Parallel()
	clients := many(300)
	const limit = 20 << 20
	t.Run("bodies", func(t *testing.T) {
		p := startWith(t, nil, nil)
		before := p.footprint()
		atOnce(clients, func() {
			io.WriteString(p.dial(), "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33554432\r\n\r\n{")
		})
		after := p.until("all of them in flight", func(u footprint) bool { return u.inFlight == clients })
		t.Logf("%d bytes more: before %+v, after %+v", after.resident-before.resident, before, after)
		if grown := after.resident - before.resident; grown > limit {
			t.Errorf("%d clients took %d bytes, want at most %d", clients, grown, limit)
		}
	})
	t.Run("frames", func(t *testing.T) { // of HTTP/2, whose length is reserved: there is no larger one
		p := startWith(t, nil, withTLS(t, map[string]string{}))
		c := p.dial()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(c, helloHTTP2+"\x00\x40\x01\x00\x00\x00\x00\x00\x01{")
		for {
			kind, _, err := readFrame(c)
			if err != nil {
				t.Fatalf("a frame of 16 KiB and 1 byte is not refused: %v", err)
			}
			if kind == frameGoAway {
				break
			}
		}
		c.Close()
		before := p.footprint()
		atOnce(clients, func() {
			c := p.dial()
			io.WriteString(c, helloHTTP2+"\x00\x40\x00\x00\x00\x00\x00\x00\x01{") // DATA of 16 KiB, which every server takes
			readFrame(c)
		})
		after := p.until("all of them connected", func(u footprint) bool { return u.goroutines >= before.goroutines+clients })
		t.Logf("%d bytes more: before %+v, after %+v", after.resident-before.resident, before, after)
		if grown := after.heap - before.heap; grown > limit {
			t.Errorf("%d clients took %d bytes, want at most %d", clients, grown, limit)
		}
	})
}

func TestClientsThatDoNotReadHinderNobody(t *testing.T) {
	t.Parallel()
	const events = 200
	stuck := many(50)
	next := make(chan struct{}, 1)
	var taken atomic.Int64 // bytes of those that are stuck
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if bytes.Contains(body, []byte("steady")) {
			sse(w)
			for range events {
				select {
				case <-next:
				case <-r.Context().Done():
					return
				}
				sse(w, "data: 1\n\n")
			}
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		big := []byte("data: " + strings.Repeat("x", 1<<16) + "\n\n")
		for r.Context().Err() == nil {
			n, _ := w.Write(big)
			taken.Add(int64(n))
		}
	}, map[string]string{"WRITE_TIMEOUT": "2s"})
	before := p.footprint()
	atOnce(stuck, func() { io.WriteString(p.dial(), rawChat) })

	res, err := http.Post(p.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":["steady"]}`))
	fatalIf(t, err)
	defer res.Body.Close()
	lines := bufio.NewReader(res.Body)
	var slowest time.Duration
	for n := range events {
		sent := time.Now()
		next <- struct{}{}
		for range 2 {
			if _, err := lines.ReadString('\n'); err != nil {
				t.Fatalf("event %d: %v", n, err)
			}
		}
		slowest = max(slowest, time.Since(sent))
	}
	beside := p.footprint()
	after := p.until("those that are stuck cut off", func(u footprint) bool { return u.inFlight == 0 })
	t.Logf("%d stuck streams of %d bytes; the slowest of %d events beside them took %v; before %+v, beside %+v, after %+v",
		stuck, taken.Load(), events, slowest, before, beside, after)
	if slowest > time.Second {
		t.Errorf("an event took %v beside streams that nobody reads", slowest)
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	t.Parallel()
	p := startWith(t, nil, withTLS(t, map[string]string{}))
	for _, tt := range []struct {
		name  string
		max   uint16
		suite uint16
		ok    bool
	}{
		{"TLS 1.3", tls.VersionTLS13, 0, true},
		{"TLS 1.2, AEAD", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, true},
		{"TLS 1.2, CBC", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, false},
		{"TLS 1.2, CBC and SHA-256", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256, false},
		{"TLS 1.1", tls.VersionTLS11, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, false},
		{"TLS 1.0", tls.VersionTLS10, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, false},
	} {
		cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tt.max}
		if tt.suite != 0 {
			cfg.CipherSuites = []uint16{tt.suite}
		}
		c, err := tls.Dial("tcp", strings.TrimPrefix(p.url, "https://"), cfg)
		if err == nil {
			c.Close()
		}
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v, want it taken: %v", tt.name, err, tt.ok)
		}
	}
}
