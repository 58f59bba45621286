//go:build linux

package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"
)

// An upstream stands in for Qwen. Over HTTP/1.1 it is a loop over raw connections, so that little of the machine goes
// to it; over HTTP/2 it is net/http's server.
type upstream struct {
	mu   sync.Mutex
	gate chan struct{} // closed when the streams that hold may go on
}

// upstreamMain is the command "bench upstream". It prints its port, lets streams go on at each line of its standard input, and
// ends with that.
func upstreamMain(args []string, stdin io.Reader, stdout io.Writer) error {
	flags := flag.NewFlagSet("upstream", flag.ContinueOnError)
	mode := flags.String("mode", "plain", "plain, tls1 or tls2")
	ca := flags.String("ca", "", "file to write the certificate to")
	addresses := flags.Int("addresses", 1, "how many addresses from 127.0.0.1 on the certificate is for")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ln, err := net.Listen("tcp4", "0.0.0.0:0") // all of 127.0.0.0/8, so that no pair of addresses runs out of ports
	if err != nil {
		return err
	}
	u := &upstream{gate: make(chan struct{})}
	if *mode != "plain" {
		cert, err := selfSigned(*ca, *addresses)
		if err != nil {
			return err
		}
		conf := &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}}
		if *mode == "tls2" {
			conf.NextProtos = []string{"h2", "http/1.1"} // nginx speaks the latter alone
		}
		ln = tls.NewListener(ln, conf)
	}
	fmt.Fprintln(stdout, ln.Addr().(*net.TCPAddr).Port)
	if *mode == "tls2" {
		srv := &http.Server{Handler: u, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 250}, ErrorLog: log.New(io.Discard, "", 0)}
		go srv.Serve(ln)
	} else {
		go u.serve(ln)
	}
	lines := bufio.NewScanner(stdin)
	for lines.Scan() {
		u.mu.Lock()
		close(u.gate)
		u.gate = make(chan struct{})
		u.mu.Unlock()
	}
	return lines.Err()
}

// selfSigned returns a certificate that is its own authority, having written it to the file ca.
func selfSigned(ca string, addresses int) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	for i := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.IPv4(127, 0, 0, byte(i+1)))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, os.WriteFile(ca, text, 0o644)
}

func (u *upstream) serve(ln net.Listener) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			u.converse(conn)
		}()
	}
}

// specReach is how far from the beginning of a body its spec is.
const specReach = 1 << 10

// scratch are buffers for the part of a body that nobody looks at.
var scratch = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// The heads of the answers, with what Qwen's have.
const answerFields = "Server: istio-envoy\r\nVary: Origin\r\nX-Request-Id: 0e2a6e7c-6a0e-9a51-b2b1-3c1a63b1f0d4\r\nX-Envoy-Upstream-Service-Time: 412\r\n"

var (
	wholeAnswer = fmt.Appendf(nil, "HTTP/1.1 200 OK\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", answerFields, len(answerBody), answerBody)
	streamHead  = "HTTP/1.1 200 OK\r\n" + answerFields + "Content-Type: text/event-stream;charset=UTF-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)

// converse answers the requests on one connection.
func (u *upstream) converse(conn net.Conn) {
	br := bufio.NewReaderSize(conn, 4<<10)
	start := make([]byte, specReach)
	for {
		h, err := readHead(br)
		if err != nil || h.length < 0 { // no proxy here sends a chunked body
			return
		}
		n, err := io.ReadFull(br, start[:min(h.length, specReach)])
		if err != nil {
			return
		}
		buf := scratch.Get().(*[64 << 10]byte)
		for rest := h.length - int64(n); rest > 0 && err == nil; {
			var m int
			m, err = io.ReadFull(br, buf[:min(rest, int64(len(buf)))])
			rest -= int64(m)
		}
		scratch.Put(buf)
		if err != nil {
			return
		}
		s, err := parseSpec(start[:n])
		switch {
		case err != nil:
			fmt.Fprintf(conn, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
		case s.chunks == 0:
			_, err = conn.Write(wholeAnswer)
		default:
			b := append(make([]byte, 0, 1<<10), streamHead...)
			err = u.stream(s, func(event []byte) error {
				b = fmt.Appendf(b, "%x\r\n%s\r\n", len(event), event)
				return nil
			}, func() error {
				_, err := conn.Write(b)
				b = b[:0]
				return err
			})
			if err == nil {
				_, err = io.WriteString(conn, "0\r\n\r\n")
			}
		}
		if err != nil || h.close {
			return
		}
	}
}

// stream adds the events that s asks for, and flushes behind each burst of them.
func (u *upstream) stream(s spec, add func(event []byte) error, flush func() error) error {
	u.mu.Lock()
	gate := u.gate
	u.mu.Unlock()
	due := time.Now()
	b := make([]byte, 0, eventSize)
	for k := range s.chunks {
		if s.hold && k == s.chunks/2 {
			<-gate
			due = time.Now()
		}
		if k%max(1, s.burst) == 0 {
			time.Sleep(time.Until(due))
			due = due.Add(s.every)
		}
		b = appendEvent(b[:0], k, monotonic())
		if err := add(b); err != nil {
			return err
		}
		if (k+1)%max(1, s.burst) == 0 {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return errors.Join(add([]byte(doneEvent)), flush())
}

// ServeHTTP answers over HTTP/2.
func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	s, specErr := parseSpec(body[:min(len(body), specReach)])
	if err = errors.Join(err, specErr); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	h := w.Header()
	for line := range bytes.Lines([]byte(answerFields)) {
		name, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(": "))
		h.Set(string(name), string(value))
	}
	if s.chunks == 0 {
		h.Set("Content-Type", "application/json")
		h.Set("Content-Length", strconv.Itoa(len(answerBody)))
		w.Write(answerBody)
		return
	}
	h.Set("Content-Type", "text/event-stream;charset=UTF-8")
	u.stream(s, func(event []byte) error {
		_, err := w.Write(event)
		return err
	}, http.NewResponseController(w).Flush)
}
