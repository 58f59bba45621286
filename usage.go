package main

import (
	"bytes"
	"strconv"
	"strings"
)

// tokenKinds are the values of the kind label. In OpenAI's shapes input includes cached, in Anthropic's it does not.
var tokenKinds = [...]string{"input", "output", "cached"}

// usageMembers are the members of a usage object that the proxy counts, OpenAI's and Anthropic's: two for each kind, and one more.
var usageMembers = []string{
	"prompt_tokens", "input_tokens", // input
	"completion_tokens", "output_tokens", // output
	"cache_read_input_tokens", "prompt_tokens_details", "input_tokens_details", // cached: the last two are objects with cached_tokens
}

// usageMark comes before a usage object. A string never holds it: its quotes are escaped. Only the
// arguments of a tool call on /v1/messages, which are an object there, can hold a usage object that is not the answer's own.
const usageMark = `"usage":`

// maxUsage bounds usageMark with its object, in bytes. They take about 300.
const maxUsage = 4 << 10

// A tokenUsage is the number of tokens that an answer, JSON or a stream, has reported so far. It finds the numbers while the answer
// passes. It parses only what follows usageMark, so most of an answer costs one search. The zero value is ready for an answer.
type tokenUsage struct {
	tokens [len(tokenKinds)]int64 // the latest numbers
	known  [len(tokenKinds)]bool  // the answer has reported the number
	rest   []byte                 // the end of what has passed, if a usage object may begin there; at most maxUsage bytes
}

// look takes the next bytes of the answer. It keeps none of p.
func (u *tokenUsage) look(p []byte) {
	if len(u.rest) > 0 {
		p = append(u.rest, p...)
		u.rest = nil
	}
	for i := markIn(p); i >= 0; i = markIn(p) {
		start := skipSpace(p, i+len(usageMark))
		end, err := start, error(nil)
		if byteAt(p, start) == '{' {
			end, err = skipValue(p, start)
		}
		switch cut := err != nil || start == len(p); {
		case cut && len(p)-i <= maxUsage:
			u.rest = bytes.Clone(p[i:])
			return
		case cut || end-i > maxUsage: // too large for a usage object
			end = start
		case end > start: // most events of DashScope have null instead
			u.take(p[start:end])
		}
		p = p[end:]
	}
	if n := markAtEnd(p); n > 0 {
		u.rest = bytes.Clone(p[len(p)-n:])
	}
}

// markIn returns the index of usageMark in p, or -1. It searches for the g, which is rare in events. bytes.Index searches for the
// quote and takes five times as long.
func markIn(p []byte) int {
	const g = len(`"usa`)
	for at := g; at < len(p); at++ {
		i := bytes.IndexByte(p[at:], usageMark[g])
		if i < 0 {
			break
		}
		at += i
		if start := at - g; len(p)-start >= len(usageMark) && string(p[start:start+len(usageMark)]) == usageMark {
			return start
		}
	}
	return -1
}

// markAtEnd returns how many bytes of usageMark p ends with.
func markAtEnd(p []byte) int {
	if len(p) == 0 || strings.IndexByte(usageMark, p[len(p)-1]) < 0 {
		return 0 // as at the end of an event
	}
	for n := min(len(p), len(usageMark)-1); n > 0; n-- {
		if string(p[len(p)-n:]) == usageMark[:n] {
			return n
		}
	}
	return 0
}

// take replaces the numbers that object has. Anthropic's streams report the input at their beginning and the output at their end.
func (u *tokenUsage) take(object []byte) {
	found, err := findMembers(object, usageMembers...)
	if err != nil {
		return
	}
	for i, m := range found {
		value, kind := m.of(object), min(i/2, len(tokenKinds)-1)
		if byteAt(value, 0) == '{' {
			if inside, err := findMembers(value, "cached_tokens"); err == nil {
				value = inside[0].of(value)
			}
		}
		if n, err := strconv.ParseInt(string(value), 10, 40); err == nil && n >= 0 { // larger ones are no numbers of tokens
			u.tokens[kind], u.known[kind] = n, true
		}
	}
}
