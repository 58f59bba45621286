package e2e

import (
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

	"qwen-go-proxy/e2e/testkit"
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
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	_, body, err := testkit.Ask(p.t, client, "GET", p.url+"/health/detailed", nil)
	fatalIf(p.t, err)
	var detailed struct {
		Goroutines int
		Requests   struct {
			InFlight int `json:"in_flight"`
		}
		Memory struct {
			Heap int `json:"heap_bytes"`
		}
	}
	fatalIf(p.t, json.Unmarshal([]byte(body), &detailed))
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	fatalIf(p.t, err)
	u = footprint{detailed.Goroutines, len(descriptors), detailed.Requests.InFlight - 1, p.memory("VmRSS"), detailed.Memory.Heap}
	return u
}

// until returns p's footprint once it is as wanted, or fails the test.
func (p *program) until(what string, wanted func(footprint) bool) (u footprint) {
	p.t.Helper()
	until(p.t, what, func() bool {
		u = p.footprint()
		return wanted(u)
	})
	return u
}

// TestAnnouncementsTakeNoMemory: memory goes by what has come, never by what is said to come.
func TestAnnouncementsTakeNoMemory(t *testing.T) {
	t.Parallel()
	clients := many(300)
	const limit = 20 << 20
	p := startWith(t, nil, nil)
	before := p.footprint()
	atOnce(clients, func() {
		io.WriteString(p.dial(), "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33554432\r\n\r\n{")
	})
	after := p.until("all of them in flight", func(u footprint) bool { return u.inFlight == clients })
	if grown := after.resident - before.resident; grown > limit {
		t.Errorf("%d clients took %d bytes, want at most %d", clients, grown, limit)
	}
}

func TestClientsThatDoNotReadHinderNobody(t *testing.T) {
	t.Parallel()
	const events = 200
	next := make(chan struct{}, 1)
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if bytes.Contains(body, []byte("steady")) {
			for range events {
				<-next
				sse(w, "data: 1\n\n")
			}
			return
		}
		for r.Context().Err() == nil {
			sse(w, "data: "+strings.Repeat("x", 1<<16)+"\n\n")
		}
	}, map[string]string{"WRITE_TIMEOUT": "5s"})
	atOnce(many(50), func() { io.WriteString(p.dial(), rawChat) })
	next <- struct{}{}
	res, err := http.Post(p.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":["steady"]}`))
	fatalIf(t, err)
	defer res.Body.Close()
	for n := range events { // each comes while others are stuck
		if _, err := io.ReadFull(res.Body, make([]byte, len("data: 1\n\n"))); err != nil {
			t.Fatalf("event %d: %v", n, err)
		}
		if n < events-1 {
			next <- struct{}{}
		}
	}
	p.until("those that are stuck cut off", func(u footprint) bool { return u.inFlight == 0 })
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
