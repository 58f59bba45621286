package main

import (
	"bytes"
	"strconv"
	"strings"
)

// tokenKinds are the values of the kind label. In OpenAI's shapes input includes cached, in Anthropic's it does not.
var tokenKinds = [...]string{"input", "output", "cached"}

// usageMembers are the members of a usage object that the proxy counts.
var usageMembers = [...]struct {
	name, inside string // inside is a member of the object name; "" if name is the number itself
	kind         int    // an index of tokenKinds
}{
	{"prompt_tokens", "", 0}, {"completion_tokens", "", 1}, {"prompt_tokens_details", "cached_tokens", 2}, // OpenAI's chat and embeddings
	{"input_tokens", "", 0}, {"output_tokens", "", 1}, {"input_tokens_details", "cached_tokens", 2}, // OpenAI's responses
	{"cache_read_input_tokens", "", 2}, // Anthropic, which has input_tokens and output_tokens too
}

// usageMark comes before a usage object. Text that a model writes never matches it: its quotes are escaped.
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
	for {
		i := markIn(p)
		if i < 0 {
			break
		}
		start := skipSpace(p, i+len(usageMark))
		end, whole := start, start < len(p)
		if byteAt(p, start) == '{' {
			var err error
			end, err = skipValue(p, start)
			whole = err == nil
		}
		if !whole {
			end = len(p)
		}
		switch {
		case end-i > maxUsage: // too large for a usage object
			end = start
		case !whole:
			u.rest = bytes.Clone(p[i:])
			return
		case end > start: // else it is no object: most events of DashScope have null
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
	names := make([]string, len(usageMembers))
	for i, m := range usageMembers {
		names[i] = m.name
	}
	found, err := findMembers(object, names...)
	if err != nil {
		return
	}
	for i, m := range usageMembers {
		value := found[i].of(object)
		if m.inside != "" {
			inside, err := findMembers(value, m.inside)
			if err != nil {
				continue
			}
			value = inside[0].of(value)
		}
		if n, err := strconv.ParseInt(string(value), 10, 64); err == nil && n >= 0 {
			u.tokens[m.kind], u.known[m.kind] = n, true
		}
	}
}
