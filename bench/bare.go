//go:build linux

package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"sync"
)

// bareMain is the command "bench bare": what an httputil.ReverseProxy costs that does nothing but forward, and is tuned for it.
func bareMain(args []string) error {
	flags := flag.NewFlagSet("bare", flag.ContinueOnError)
	listen := flags.String("listen", "", "address")
	to := flags.String("to", "", "the upstream's URL")
	ca := flags.String("ca", "", "file with the upstream's certificate")
	if err := flags.Parse(args); err != nil {
		return err
	}
	target, err := url.Parse(*to)
	if err != nil {
		return err
	}
	conf := &tls.Config{}
	if *ca != "" {
		text, err := os.ReadFile(*ca)
		if err != nil {
			return err
		}
		conf.RootCAs = x509.NewCertPool()
		conf.RootCAs.AppendCertsFromPEM(text)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			if r.Out.Body != nil {
				r.Out.Body = &lastingEOF{ReadCloser: r.Out.Body}
			}
		},
		FlushInterval: -1,
		BufferPool:    new(buffers),
		Transport: &http.Transport{
			MaxIdleConnsPerHost: 1024,
			DisableCompression:  true,
			ForceAttemptHTTP2:   true,
			TLSClientConfig:     conf,
		},
	}
	return http.ListenAndServe(*listen, proxy)
}

// A lastingEOF is a request body that, once at its end, stays there. Without it some streams are cut off: net/http's server closes a
// body when the answer begins, and where its transport looks once more for the end only then, it takes the error for a failure of the
// request and closes the connection that the answer comes from (go.dev/issue/40747).
type lastingEOF struct {
	io.ReadCloser
	ended bool
}

func (b *lastingEOF) Read(p []byte) (int, error) {
	if b.ended {
		return 0, io.EOF
	}
	n, err := b.ReadCloser.Read(p)
	b.ended = err == io.EOF
	return n, err
}

// buffers is an httputil.BufferPool.
type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if p, ok := b.pool.Get().(*[32 << 10]byte); ok {
		return p[:]
	}
	return make([]byte, 32<<10)
}

func (b *buffers) Put(p []byte) { b.pool.Put((*[32 << 10]byte)(p)) }
