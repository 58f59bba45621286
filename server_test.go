package main

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestWatchFilesLogsEachCauseOnce has a file break, break in another way, and be repaired, twice.
func TestWatchFilesLogsEachCauseOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logBuffer
		var broken atomic.Pointer[error]
		file := &watchedFile{name: "KEYS", fallback: "the last keys stay in use", read: func() error { return *broken.Load() }}
		broken.Store(new(error))
		watchFiles(t.Context(), newLogger(&config{logFormat: "text"}, &log), 5*time.Second, []*watchedFile{file})
		for range 2 {
			for _, err := range []error{nil, errors.New("empty"), errors.New("gone"), nil} {
				broken.Store(&err)
				time.Sleep(time.Minute)
			}
		}
		synctest.Wait()
		var got []string
		for line := range strings.Lines(log.String()) {
			_, line, _ = strings.Cut(line, "level=")
			got = append(got, strings.TrimSpace(line))
		}
		once := []string{
			`ERROR msg="KEYS can't be used; the last keys stay in use" error=empty`,
			`ERROR msg="KEYS can't be used; the last keys stay in use" error=gone`,
			`INFO msg="KEYS can be used again"`,
		}
		wantEqual(t, "log", append(once, once...), got)
	})
}

func TestARenewedCertificateIsServed(t *testing.T) {
	firstCert, firstKey := certificate(t)
	secondCert, secondKey := certificate(t)
	dir := t.TempDir()
	broken := filepath.Join(dir, "broken")
	writeFile(t, broken, "-----BEGIN CERT")
	synctest.Test(t, func(t *testing.T) {
		var log logBuffer
		cfg := &config{certFile: filepath.Join(dir, "cert.pem"), keyFile: filepath.Join(dir, "key.pem")}
		serving, cert := followCertificate(cfg)
		for _, tt := range []struct {
			name      string
			cert, key string // put in place
			want      string // the certificate served 10 s later
			complains int    // log lines so far
		}{
			{"the first", firstCert, firstKey, firstCert, 0},
			{"a renewal", secondCert, secondKey, secondCert, 0},
			{"a broken renewal", broken, secondKey, secondCert, 1},
			{"a mended one", firstCert, firstKey, firstCert, 2},
			{"a certificate before its key", secondCert, firstKey, firstCert, 3},
			{"the key behind it", "", secondKey, secondCert, 4},
			{"the same again", "", "", secondCert, 4},
		} {
			served := func() string {
				t.Helper()
				c, err := serving.GetCertificate(&tls.ClientHelloInfo{})
				fatalIf(t, err)
				for _, file := range []string{firstCert, secondCert} {
					if b, _ := pem.Decode([]byte(readFile(t, file))); bytes.Equal(b.Bytes, c.Certificate[0]) {
						return file
					}
				}
				return "another"
			}
			for to, from := range map[string]string{cfg.certFile: tt.cert, cfg.keyFile: tt.key} {
				if from != "" {
					writeFile(t, to, readFile(t, from))
					fatalIf(t, os.Chtimes(to, time.Now(), time.Now()))
				}
			}
			if tt.name == "the first" {
				watchFiles(t.Context(), newLogger(&config{}, &log), 5*time.Second, []*watchedFile{cert})
				synctest.Wait()
				time.Sleep(time.Second) // no change comes while a file is read
			} else {
				time.Sleep(10 * time.Second)
			}
			for range 3 {
				if got := served(); got != tt.want {
					t.Errorf("%s: %s is served, want %s", tt.name, got, tt.want)
				}
				time.Sleep(10 * time.Second)
			}
			if n := strings.Count(log.String(), "\n"); n != tt.complains {
				t.Errorf("%s: %d log lines, want %d:\n%s", tt.name, n, tt.complains, &log)
			}
		}
	})
}
