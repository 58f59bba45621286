package main

import (
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

func TestAllowAt(t *testing.T) {
	type call struct {
		at         time.Duration // since the first call
		ok         bool
		remaining  int
		reset      time.Duration // since the first call
		retryAfter time.Duration
	}
	const ms, s, day = time.Millisecond, time.Second, 24 * time.Hour

	for _, tt := range []struct {
		name  string
		rate  float64
		burst int
		want  []call
	}{
		{"an interval that is no whole number of nanoseconds is rounded down", 3, 1, []call{
			{at: 0, ok: true, remaining: 0, reset: 333_333_333},
			{at: 333_333_332, ok: false, reset: 333_333_333, retryAfter: 1},
			{at: 333_333_333, ok: true, remaining: 0, reset: 666_666_666},
		}},
		{"a bucket of a million that takes 31 years to fill", 0.001, 1_000_000, []call{
			{at: 0, ok: true, remaining: 999_999, reset: 1000 * s},
			{at: 0, ok: true, remaining: 999_998, reset: 2000 * s},
		}},
		{"a bucket that would take 30000 years takes 73", 1e-6, 1_000_000, []call{
			{at: 0, ok: true, remaining: 999_999, reset: maxRefill / 1_000_000},
			{at: maxRefill / 1_000_000, ok: true, remaining: 999_999, reset: 2 * (maxRefill / 1_000_000)},
		}},
		{"an interval that would overflow", 1e-300, 1, []call{
			{at: 0, ok: true, remaining: 0, reset: maxRefill},
			{at: day, ok: false, reset: maxRefill, retryAfter: maxRefill - day},
		}},
		{"more than one request a nanosecond", 1e12, 2, []call{
			{at: 0, ok: true, remaining: 1, reset: 1},
			{at: 0, ok: true, remaining: 0, reset: 2},
			{at: 0, ok: false, reset: 2, retryAfter: 1},
			{at: 1, ok: true, remaining: 0, reset: 3},
		}},
		{"a clock set back by a year keeps the client waiting for one refill", 10, 3, []call{
			{at: 0, ok: true, remaining: 2, reset: 100 * ms},
			{at: -365 * day, ok: false, reset: -365*day + 500*ms, retryAfter: 300 * ms},
			{at: -365*day + 300*ms - 1, ok: false, reset: -365*day + 500*ms, retryAfter: 1},
			{at: -365*day + 300*ms, ok: true, remaining: 0, reset: -365*day + 600*ms},
		}},
		{"a request that was overtaken by a later one gives no token back", 10, 3, []call{
			{at: 0, ok: true, remaining: 2, reset: 100 * ms},
			{at: 0, ok: true, remaining: 1, reset: 200 * ms},
			{at: 0, ok: true, remaining: 0, reset: 300 * ms},
			{at: -50 * ms, ok: false, reset: 300 * ms, retryAfter: 150 * ms},
			{at: 100*ms - 1, ok: false, reset: 300 * ms, retryAfter: 1},
			{at: 100 * ms, ok: true, remaining: 0, reset: 400 * ms},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newRateLimiter(tt.rate, tt.burst)
			first := time.Now()
			var got []call
			for _, c := range tt.want {
				d := l.allowAt(1, first.Add(c.at))
				got = append(got, call{c.at, d.ok, d.remaining, d.reset.Sub(first), d.retryAfter})
			}
			wantEqual(t, "decisions", tt.want, got, cmp.AllowUnexported(call{}))
		})
	}
}

// A token bucket in exact arithmetic: tokens grow with time up to burst, and a request takes one.
func TestAllowAtAgreesWithTokenCount(t *testing.T) {
	const year = 365 * 24 * time.Hour
	for _, rate := range []float64{0.001, 0.5, 1, 10, 2500, 100_000} { // the interval is whole nanoseconds
		for _, burst := range []int{1, 2, 20, 1_000_000} {
			t.Run(fmt.Sprintf("%v a second, burst %d", rate, burst), func(t *testing.T) {
				random := rand.New(rand.NewPCG(uint64(burst), uint64(rate*1000)))
				l := newRateLimiter(rate, burst)
				now := time.Now()
				one := big.NewRat(1, 1)
				size := big.NewRat(int64(burst), 1)
				tokens := new(big.Rat).Set(size)
				// An exact rate: the float64 nearest to 0.001 is not a thousandth.
				perNano := big.NewRat(int64(rate*1000), 1000*int64(time.Second))
				nanos := func(tokens *big.Rat) time.Duration {
					q := new(big.Rat).Quo(tokens, perNano)
					if !q.IsInt() {
						t.Fatalf("%v tokens take %v ns, want a whole number", tokens, q)
					}
					return time.Duration(q.Num().Int64())
				}

				for i := range 1000 {
					var pause int64
					switch random.IntN(4) { // else none
					case 0:
						pause = random.Int64N(2 * int64(l.interval))
					case 1:
						pause = int64(l.interval)
					case 2:
						if random.IntN(20) == 0 {
							pause = random.Int64N(2 * int64(min(l.refill, year))) // centuries do not fit a time.Duration
						}
					}
					now = now.Add(time.Duration(pause))
					tokens.Add(tokens, new(big.Rat).Mul(perNano, big.NewRat(pause, 1)))
					if tokens.Cmp(size) > 0 {
						tokens.Set(size)
					}

					var want rateDecision
					if tokens.Cmp(one) >= 0 {
						tokens.Sub(tokens, one)
						want.ok = true
					} else {
						want.retryAfter = nanos(new(big.Rat).Sub(one, tokens))
					}
					want.remaining = int(new(big.Int).Quo(tokens.Num(), tokens.Denom()).Int64())
					want.reset = now.Add(nanos(new(big.Rat).Sub(size, tokens)))

					if got := l.allowAt(1, now); got != want {
						t.Fatalf("request %d: got %+v, want %+v", i, got, want)
					}
				}
			})
		}
	}
}

func TestAllowAtConcurrently(t *testing.T) {
	const burst = 100
	l := newRateLimiter(10, burst)
	now := time.Now()
	var admitted atomic.Int64
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(func() {
			if l.allowAt(1, now).ok {
				admitted.Add(1)
			}
		})
	}
	wg.Wait()
	if got := admitted.Load(); got != burst {
		t.Errorf("%d of 1000 simultaneous requests admitted, want %d", got, burst)
	}
}

// Two million clients call within five intervals, so that the table is full three times over.
func TestAllowAtFullTable(t *testing.T) {
	const (
		interval  = 10 * time.Second
		intervals = 5
		clients   = 2_000_000
		burst     = 20
	)
	l := newRateLimiter(1/interval.Seconds(), burst)
	now := time.Now()

	key := func(i uint64) rateKey {
		return addressKey(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 4: byte(i >> 24), byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	const drained, steady, edge = 1 << 30, 1<<30 + 1, 1<<30 + 2
	for range burst { // two clients have used up their bursts; the edge client then keeps to the rate
		l.allowAt(key(drained), now)
		l.allowAt(key(edge), now)
	}

	var admitted int
	for i := range uint64(clients) {
		if !l.allowAt(key(i), now).ok {
			t.Fatalf("first request of client %d refused", i)
		}
		now = now.Add(intervals * interval / clients)
		if i%(clients/intervals/10) == 0 && l.allowAt(key(drained), now).ok {
			admitted++
		}
		if (i+1)%(clients/intervals) == 0 {
			if !l.allowAt(key(steady), now).ok {
				t.Error("a client that keeps to the rate was refused")
			}
			if !l.allowAt(key(edge), now).ok {
				t.Error("a client that keeps to the rate after a burst was refused")
			}
		}
	}
	if want := intervals - 1; admitted != want { // the fifth token comes just after its last request
		t.Errorf("a client that never lets up was admitted %d times after its burst, want %d", admitted, want)
	}

	const limit = 32 << 20
	if size := unsafe.Sizeof(*l) + uintptr(len(l.sets))*unsafe.Sizeof(l.sets[0]); size > limit {
		t.Errorf("a limiter takes %d bytes, want at most %d", size, limit)
	}
}

func TestAddressKey(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff", true}, // one /64
		{"2001:db8:1:2::1", "2001:db8:1:3::1", false},
		{"fe80::1%eth0", "fe80::1%eth1", true},
		{"::1", "::ffff:0.0.0.1", false},
	} {
		if same := addressKey(netip.MustParseAddr(tt.a)) == addressKey(netip.MustParseAddr(tt.b)); same != tt.same {
			t.Errorf("%s and %s have one key: %t, want %t", tt.a, tt.b, same, tt.same)
		}
	}
	addressKey(netip.Addr{}) // an unknown address is a client like any other
}

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, map[string]string{"RATE_LIMIT_RPS": "0.4", "RATE_LIMIT_BURST": "2", "SERVER_HOST": "127.0.0.1"}, func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 200, "{}") })
		start := time.Now().Unix()
		at := func(seconds int64) string { return strconv.FormatInt(start+seconds, 10) }
		for _, tt := range []struct {
			pause                               time.Duration
			status                              int
			limit, remaining, reset, retryAfter string
		}{
			{0, 200, "0.4", "1", at(3), ""}, // 2.5 s
			{0, 200, "0.4", "0", at(5), ""},
			{0, 429, "0.4", "0", at(5), "3"},
			{2500 * time.Millisecond, 200, "0.4", "0", at(8), ""}, // 7.5 s
		} {
			time.Sleep(tt.pause)
			res := b.post(t, "/v1/chat/completions", ordinaryChat)
			h := res.Header
			want := []string{tt.limit, tt.remaining, tt.reset, tt.retryAfter}
			wantEqual(t, res.Status, want, []string{h.Get("X-RateLimit-Limit"), h.Get("X-RateLimit-Remaining"), h.Get("X-RateLimit-Reset"), h.Get("Retry-After")})
			body, _ := io.ReadAll(res.Body)
			if res.StatusCode != tt.status {
				t.Errorf("%s, want %d", res.Status, tt.status)
			} else if res.StatusCode == 429 {
				e := wantError(t, res, string(body), 429, typeRateLimit, "rate_limit_exceeded")
				wantEqual(t, "message", "Too many requests: this proxy allows each client 0.4 a second. Try again in 3 s, or raise RATE_LIMIT_RPS or RATE_LIMIT_BURST.", e.Error.Message)
			}
		}
	})
}

func TestAllowAtDoesNotAllocate(t *testing.T) {
	l := newRateLimiter(10, 20)
	addr := netip.MustParseAddr("2001:db8::1%eth0")
	now := time.Now()
	if n := testing.AllocsPerRun(100, func() { l.allowAt(addressKey(addr), now) }); n != 0 {
		t.Errorf("%v allocations a request, want 0", n)
	}
}
