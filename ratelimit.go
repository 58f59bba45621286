package main

import (
	"fmt"
	"hash/maphash"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"
)

const (
	// rateLimiterSets is the size of a limiter's table: 131072 buckets in 2.1 MiB. A bucket matters only until it is full
	// again, and a whole IPv6 site, a /48, has 65536 clients.
	rateLimiterSets = 1 << 14

	// maxRefill bounds the time a bucket takes to fill, 73 years, so that sums of such times cannot overflow.
	maxRefill = time.Duration(1 << 61)
)

// A rateLimiter is a token bucket per client, in memory that does not grow with the number of clients. It is safe for
// concurrent use.
//
// It keeps a bucket as one time: when the bucket will be full again. Each token that is taken moves that time on by one interval.
// This is the theoretical arrival time of the generic cell rate algorithm (ITU-T I.371). A full bucket is the same as none, so
// there is nothing to sweep.
//
// The buckets stand in a table like a CPU's cache: a client's key chooses one of its sets, and a client that is new there
// replaces the fullest bucket of the set. So nobody gets rid of an empty bucket by calling from other addresses, and a client
// whose bucket is replaced comes back to a full one.
type rateLimiter struct {
	interval time.Duration // a token's worth of time
	refill   time.Duration // a full bucket's worth of time
	start    time.Time
	rate     []string // the X-RateLimit-Limit header, shared by all responses and never changed
	sets     []bucketSet
}

// A bucketSet holds the buckets of the clients whose keys fall on it.
type bucketSet struct {
	mu      sync.Mutex // guards buckets
	buckets [8]bucket
}

// A bucket is one client's; the zero bucket is full, and free to be replaced.
type bucket struct {
	key    rateKey
	fullAt time.Duration // since the limiter's start
}

// A rateKey names a client to a rateLimiter. It is a hash whose seed differs in each process, so that nobody can choose
// addresses that fall on another client's set.
type rateKey uint64

var rateKeySeed = maphash.MakeSeed()

// addressKey returns the key of the client at a. It uses a whole IPv4 address, but only the first 64 bits of an IPv6 address: a
// host chooses the others as it likes (RFC 8981).
func addressKey(a netip.Addr) rateKey {
	b := a.As16() // which drops the zone
	if a.Is6() && !a.Is4In6() {
		return digestKey(b[:8])
	}
	return digestKey(b[:])
}

// digestKey returns the key of the client that has these bytes, such as the digest of its API key.
func digestKey(digest []byte) rateKey {
	return rateKey(maphash.Bytes(rateKeySeed, digest))
}

// newRateLimiter returns a limiter that admits rate requests a second from each client and, after a pause, burst of them at once,
// at least 1. It returns nil, which limits nothing, if rate is 0. The interval between tokens is rounded down to whole
// nanoseconds, which lets clients send slightly more. Intervals whose burst would exceed maxRefill are shortened to it.
func newRateLimiter(rate float64, burst int) *rateLimiter {
	if rate <= 0 {
		return nil
	}
	interval := time.Duration(max(1, min(float64(time.Second)/rate, float64(maxRefill)/float64(burst))))
	return &rateLimiter{
		interval: interval,
		refill:   min(time.Duration(burst), maxRefill/interval) * interval,
		start:    time.Now(),
		rate:     []string{strconv.FormatFloat(rate, 'f', -1, 64)},
		// Free of pointers, so that the garbage collector leaves it alone; its pages become resident with use.
		sets: make([]bucketSet, rateLimiterSets),
	}
}

// A rateDecision says whether a request is admitted and how its client's bucket stands after it.
type rateDecision struct {
	ok         bool
	remaining  int           // whole tokens left
	reset      time.Time     // when the bucket will be full
	retryAfter time.Duration // until there is a token; 0 if ok
}

// allowAt takes a token from key's bucket, if it has one. It does not allocate. If the clock is set back, nobody waits longer
// than a bucket takes to fill.
func (l *rateLimiter) allowAt(key rateKey, now time.Time) rateDecision {
	t := now.Sub(l.start)
	set := &l.sets[key%rateLimiterSets]

	set.mu.Lock()
	b := set.bucket(key, t)
	// More than refill is missing if the clock was set back, but also if a request that read the clock later got here
	// sooner. To forget the excess would then admit too many. So it is kept while the wait, missing+interval-refill, is no
	// longer than refill.
	missing := min(max(b.fullAt-t, 0), 2*l.refill-l.interval)
	wait := max(missing+l.interval-l.refill, 0)
	if wait == 0 {
		missing += l.interval
	}
	b.fullAt = t + missing
	set.mu.Unlock()

	return rateDecision{
		ok:         wait == 0,
		remaining:  int(max(l.refill-missing, 0) / l.interval),
		reset:      now.Add(missing),
		retryAfter: wait,
	}
}

// bucket returns key's bucket. If there is none, it returns the fullest of the others, filled up at t.
func (s *bucketSet) bucket(key rateKey, t time.Duration) *bucket {
	fullest := &s.buckets[0]
	for i := range s.buckets {
		b := &s.buckets[i]
		if b.key == key {
			return b
		}
		if b.fullAt < fullest.fullAt {
			fullest = b
		}
	}
	*fullest = bucket{key, t}
	return fullest
}

// check takes a token from key's bucket, and returns a 429 with Retry-After if there is none. It sets in h X-RateLimit-Limit
// (the rate), X-RateLimit-Remaining and X-RateLimit-Reset (Unix seconds, rounded up).
func (l *rateLimiter) check(h http.Header, key rateKey) error {
	d := l.allowAt(key, time.Now())
	h["X-Ratelimit-Limit"] = l.rate // X-Ratelimit is X-RateLimit's canonical form
	h["X-Ratelimit-Remaining"] = []string{strconv.Itoa(d.remaining)}
	h["X-Ratelimit-Reset"] = []string{strconv.FormatInt(d.reset.Add(time.Second-1).Unix(), 10)}
	if d.ok {
		return nil
	}
	return &apiError{
		status: http.StatusTooManyRequests, typ: typeRateLimit, code: "rate_limit_exceeded", retryAfter: d.retryAfter,
		message: fmt.Sprintf("Too many requests: this proxy allows each client %s a second. "+
			"Try again in %s s, or raise RATE_LIMIT_RPS or RATE_LIMIT_BURST.", l.rate[0], retryAfterSeconds(d.retryAfter)),
	}
}
