//go:build linux

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A program is one of those that are compared.
type program struct {
	name string
	file string // the executable; "" is none: the load goes to the upstream directly
	ours bool

	// command makes the command that runs the program in the directory in.dir between in.addr and in.to.
	command func(p *program, in *instance) (*exec.Cmd, error)
}

// An instance is a program that runs.
type instance struct {
	program *program
	addr    string        // where it listens
	to      *destination  // where it sends requests
	dir     string        // its own
	pids    []int         // its processes; nil for the direct way
	startup time.Duration // from its start until it answers

	cmd    *exec.Cmd
	exited chan struct{}
}

// A destination is the upstream as one instance sees it.
type destination struct {
	mode string // plain, tls1 or tls2
	addr string // an address of its own, so that connections that linger take the ports of no other instance
	ca   string // file with the certificate, where there is TLS
}

func (d *destination) url() string {
	if d.mode == "plain" {
		return "http://" + d.addr
	}
	return "https://" + d.addr
}

// start runs p and waits until it answers.
func (p *program) start(dir string, to *destination) (*instance, error) {
	in := &instance{program: p, to: to}
	if p.file == "" {
		in.addr = to.addr
		return in, nil
	}
	var err error
	if in.addr, err = freeAddress(); err != nil {
		return nil, err
	}
	if in.dir, err = os.MkdirTemp(dir, p.name+"-"); err != nil {
		return nil, err
	}
	if in.cmd, err = p.command(p, in); err != nil {
		return nil, err
	}
	logFile, err := os.Create(filepath.Join(in.dir, "log"))
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	in.cmd.Dir = in.dir
	in.cmd.Env = append(in.cmd.Env, "PATH="+os.Getenv("PATH"), "HOME="+in.dir)
	in.cmd.Stdout, in.cmd.Stderr = logFile, logFile
	// Ctrl-C is for the bench, which ends what it started; the kernel does where the bench is killed.
	in.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	began := time.Now()
	if err := in.cmd.Start(); err != nil {
		return nil, err
	}
	in.exited = make(chan struct{})
	go func() {
		in.cmd.Wait()
		close(in.exited)
	}()
	for !in.answers() {
		select {
		case <-in.exited:
			err = errors.New("it ended at once")
		case <-time.After(500 * time.Microsecond):
			if time.Since(began) > 20*time.Second {
				err = errors.New("it does not answer")
			}
		}
		if err != nil {
			text, _ := os.ReadFile(logFile.Name())
			in.stop()
			return nil, fmt.Errorf("%w: %s", err, bytes.TrimSpace(text[max(0, len(text)-1000):]))
		}
	}
	in.startup = time.Since(began)
	time.Sleep(300 * time.Millisecond) // until workers are there, and what is done after listening
	if in.pids, err = family(in.cmd.Process.Pid); err != nil {
		in.stop()
		return nil, err
	}
	return in, nil
}

// answers reports whether the instance serves: ours its health, any other a connection.
func (in *instance) answers() bool {
	conn, err := net.Dial("tcp", in.addr)
	if err != nil {
		return false
	}
	defer conn.Close()
	if !in.program.ours {
		return true
	}
	conn.SetDeadline(time.Now().Add(time.Second))
	fmt.Fprintf(conn, "GET /health HTTP/1.1\r\nHost: %s\r\n\r\n", in.addr)
	h, err := readHead(bufio.NewReader(conn))
	return err == nil && h.status == 200
}

// stop ends the instance, and returns when it has ended.
func (in *instance) stop() {
	if in.cmd == nil || in.cmd.Process == nil {
		return
	}
	in.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-in.exited:
	case <-time.After(5 * time.Second):
		syscall.Kill(-in.cmd.Process.Pid, syscall.SIGKILL)
		<-in.exited
	}
	os.RemoveAll(in.dir)
}

func freeAddress() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// oursCommand runs a build of qwen-go-proxy as it is by default. Its limiter is on, at a rate that nothing here reaches.
func oursCommand(p *program, in *instance) (*exec.Cmd, error) {
	host, port, err := net.SplitHostPort(in.addr)
	cmd := exec.Command(p.file)
	cmd.Env = []string{
		"SERVER_HOST=" + host, "SERVER_PORT=" + port,
		"QWEN_API_KEY=sk-bench", "API_BASE_URL=" + in.to.url() + "/v1",
		"RATE_LIMIT_RPS=1000000", "RATE_LIMIT_BURST=1000000",
		"SSL_CERT_FILE=" + in.to.ca,
	}
	return cmd, err
}

func bareCommand(p *program, in *instance) (*exec.Cmd, error) {
	return exec.Command(p.file, "bare", "-listen", in.addr, "-to", in.to.url(), "-ca", in.to.ca), nil
}

// The configurations of the other programs pass streams on at once and keep connections open on both sides. {addr}, {to} and {dir} are
// filled in, and {dir} is the instance's directory.
const (
	nginxConfig = `
daemon off;
worker_processes auto;
pid {dir}/pid;
error_log {dir}/error.log;
events { worker_connections {connections}; }
http {
	access_log {dir}/access.log;
	client_body_temp_path {dir}/body;
	proxy_temp_path {dir}/proxy;
	fastcgi_temp_path {dir}/fastcgi;
	uwsgi_temp_path {dir}/uwsgi;
	scgi_temp_path {dir}/scgi;
	client_body_buffer_size 256k;
	client_max_body_size 32m;
	keepalive_requests 1000000000;
	upstream qwen {
		server {to};
		keepalive 1024;
		keepalive_requests 1000000000;
	}
	server {
		listen {addr};
		location / {
			proxy_pass {scheme}://qwen;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_buffering off;
			proxy_read_timeout 600s;
		}
	}
}
`
	haproxyConfig = `
global
	no strict-limits
	maxconn {connections}
defaults
	mode http
	option http-no-delay
	timeout connect 10s
	timeout client 600s
	timeout server 600s
frontend clients
	bind {addr}
	default_backend qwen
backend qwen
	http-reuse always
	server qwen {to} pool-max-conn 1024 {tls}
`
	caddyConfig = `
{
	admin off
	auto_https off
}
http://{addr} {
	bind 127.0.0.1
	reverse_proxy {scheme}://{to} {
		flush_interval -1
		transport http {
			compression off
			keepalive_idle_conns_per_host 1024
			{tls}
		}
	}
}
`
)

// configured returns the function that makes a command of a program that a file configures.
func configured(config string, tls map[string]string, args ...string) func(*program, *instance) (*exec.Cmd, error) {
	return func(p *program, in *instance) (*exec.Cmd, error) {
		scheme, _, _ := strings.Cut(in.to.url(), ":")
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			return nil, err
		}
		fill := strings.NewReplacer("{addr}", in.addr, "{to}", in.to.addr, "{dir}", in.dir, "{scheme}", scheme, "{tls}", tls[in.to.mode],
			// Each stream takes two of nginx's and one of HAProxy's, and of either no more than there are descriptors.
			"{connections}", fmt.Sprint(min(limit.Cur, 40_000)))
		file := filepath.Join(in.dir, "config")
		if err := os.WriteFile(file, []byte(fill.Replace(config)), 0o600); err != nil {
			return nil, err
		}
		full := make([]string, len(args))
		for i, arg := range args {
			full[i] = fill.Replace(strings.ReplaceAll(arg, "{config}", file))
		}
		return exec.Command(p.file, full...), nil
	}
}

// others returns the programs that qwen-go-proxy is compared with. A file that isn't there is "".
func others(self string) []*program {
	find := func(name string) string {
		for _, name := range []string{name, "/usr/sbin/" + name} { // Debian's PATH for users lacks the latter
			if file, err := exec.LookPath(name); err == nil {
				return file
			}
		}
		return ""
	}
	return []*program{
		{name: "bare", file: self, command: bareCommand},
		{name: "bare-2", file: self, command: bareCommand},
		{name: "nginx", file: find("nginx"), command: configured(nginxConfig, nil, "-p", "{dir}", "-e", "{dir}/error.log", "-c", "{config}")},
		{name: "haproxy", file: find("haproxy"), command: configured(haproxyConfig, map[string]string{
			"tls1": "ssl verify none alpn http/1.1", "tls2": "ssl verify none alpn h2",
		}, "-f", "{config}", "-db")},
		{name: "caddy", file: find("caddy"), command: configured(caddyConfig, map[string]string{
			"tls1": "tls_insecure_skip_verify\n\t\t\tversions 1.1", "tls2": "tls_insecure_skip_verify\n\t\t\tversions 2",
		}, "run", "--adapter", "caddyfile", "--config", "{config}")},
		{name: direct},
	}
}

// direct is the name of the way without a program between.
const direct = "direct"

// build builds the qwen-go-proxy in the directory source, as its Makefile does, and returns the file.
func build(source, dir string, stderr io.Writer) (string, error) {
	file := filepath.Join(dir, "qwen-go-proxy")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", file, ".")
	cmd.Dir, cmd.Stderr = source, stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build of qwen-go-proxy in %s: %w", source, err)
	}
	return file, nil
}
