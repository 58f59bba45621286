package main

import (
	"bytes"
	"encoding/hex"
	"fmt"
)

// A member is where one member of a JSON object stands in its text. The zero member is not there.
type member struct {
	name       int // the index of the name's opening quote
	start, end int // the value, without the white space around it
	next       int // the index of the next member's name, or of the closing brace
}

// findMembers finds the members called names in data, which has to be one JSON object (RFC 8259). The names are ASCII
// letters and underscores. The result has a member for each name. The error is an *apiError (400): the object is malformed,
// or has one of the names twice.
//
// It reads the outermost object alone. Inside a value it only finds the ends of strings and counts brackets, of both kinds
// together, so {"a":[1}} passes: Qwen judges what is inside values. In a valid object it finds what encoding/json finds.
func findMembers(data []byte, names ...string) ([]member, error) {
	found := make([]member, len(names))
	i := skipSpace(data, 0)
	if byteAt(data, i) != '{' {
		return nil, notObject(data, i)
	}
	i = skipSpace(data, i+1)
	for empty := byteAt(data, i) == '}'; !empty; {
		m := member{name: i}
		nameEnd, err := skipString(data, i)
		if err != nil {
			return nil, err
		}
		if i = skipSpace(data, nameEnd); byteAt(data, i) != ':' {
			return nil, unexpected(data, i)
		}
		m.start = skipSpace(data, i+1)
		if m.end, err = skipValue(data, m.start); err != nil {
			return nil, err
		}
		i = skipSpace(data, m.end)
		last := byteAt(data, i) == '}'
		if !last {
			if byteAt(data, i) != ',' {
				return nil, unexpected(data, i)
			}
			i = skipSpace(data, i+1)
		}
		m.next = i
		for k, name := range names {
			if !spells(data[m.name+1:nameEnd-1], name) {
				continue
			}
			if found[k].end != 0 {
				// Nobody can tell which of the two counts. Qwen may read it another way than we do.
				return nil, invalidRequest(name, "duplicate_member", "The request has %q twice. Send it once.", name)
			}
			found[k] = m
		}
		if last {
			break
		}
	}
	if i = skipSpace(data, i+1); i < len(data) {
		return nil, badJSON("unexpected data after the JSON object at byte %d", i)
	}
	return found, nil
}

// spells reports whether text, the inside of a JSON string, stands for name.
func spells(text []byte, name string) bool {
	for _, c := range []byte(name) {
		switch {
		case len(text) == 0:
			return false
		case text[0] == c:
			text = text[1:]
		case len(text) >= 6 && text[0] == '\\' && text[1] == 'u':
			var code [2]byte
			if n, _ := hex.Decode(code[:], text[2:6]); n != 2 || code != [2]byte{0, c} {
				return false
			}
			text = text[6:]
		default: // no short escape stands for a letter
			return false
		}
	}
	return len(text) == 0
}

// skipValue returns the index after the value that starts at i. It keeps no memory of the brackets it is in: a body may be
// nothing but brackets.
func skipValue(data []byte, i int) (int, error) {
	start := i
	switch byteAt(data, i) {
	case '"':
		return skipString(data, i)
	case '{', '[':
		for depth := 0; i < len(data); i++ {
			switch data[i] {
			case '"':
				end, err := skipString(data, i)
				if err != nil {
					return 0, err
				}
				i = end - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1, nil
				}
			}
		}
		return 0, unexpected(data, i)
	}
	for isPlain[byteAt(data, i)] {
		i++
	}
	if i == start {
		return 0, unexpected(data, i)
	}
	return i, nil
}

// isPlain tells the bytes that numbers, true, false and null consist of.
var isPlain = func() (plain [256]bool) {
	for _, c := range []byte("+-.0123456789Eaeflnrstu") {
		plain[c] = true
	}
	return plain
}()

// skipString returns the index after the string whose opening quote is expected at i.
func skipString(data []byte, i int) (int, error) {
	if byteAt(data, i) != '"' {
		return 0, unexpected(data, i)
	}
	start := i + 1
	for i = start; ; i++ {
		n := bytes.IndexByte(data[i:], '"')
		if n < 0 {
			return 0, unexpected(data, len(data))
		}
		i += n
		backslashes := i
		for backslashes > start && data[backslashes-1] == '\\' {
			backslashes--
		}
		if (i-backslashes)%2 == 0 { // else the last one escapes the quote
			return i + 1, nil
		}
	}
}

// skipSpace returns the index of the first byte from i on that is not white space, or len(data).
func skipSpace(data []byte, i int) int {
	for i < len(data) && (data[i] == ' ' || data[i] == '\n' || data[i] == '\r' || data[i] == '\t') {
		i++
	}
	return i
}

// byteAt returns data[i], or 0 at the end: the callers refuse both, since JSON allows no NUL outside of strings.
func byteAt(data []byte, i int) byte {
	if i < len(data) {
		return data[i]
	}
	return 0
}

// notObject returns the error for data, whose first byte that is not white space is at i and begins no object.
func notObject(data []byte, i int) error {
	switch {
	case i == len(data):
		return badJSON("the body is empty")
	case bytes.HasPrefix(data, []byte("\xEF\xBB\xBF")): // RFC 8259 §8.1: "MUST NOT add a byte order mark"
		return badJSON("the body starts with a byte order mark: send UTF-8 without one")
	case data[i] == '[':
		return badJSON("want a JSON object, got an array")
	}
	return badJSON("want a JSON object, which begins with {")
}

// unexpected returns the error for the byte at i, or for the end of data there.
func unexpected(data []byte, i int) error {
	if i >= len(data) {
		return badJSON("unexpected end at byte %d", len(data))
	}
	return badJSON("unexpected character at byte %d", i)
}

// badJSON returns the error for a body that is malformed. The text says where, and never quotes the body.
func badJSON(format string, args ...any) error {
	return invalidRequest("", "invalid_json", "The request body can't be read: %s.", fmt.Sprintf(format, args...))
}
