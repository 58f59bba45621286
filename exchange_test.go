package main

import "testing"

func TestBetweenEvents(t *testing.T) {
	for s, want := range map[string]bool{
		"":                        true,
		"\n":                      true, // a blank line alone
		"\r\n":                    true,
		"data: 1\n\n":             true,
		"data: 1\r\n\r\n":         true,
		"data: 1\r\r":             true,
		"data: 1\n\r\n":           true,
		"data: 1\r\n\n":           true,
		"x\n\n":                   true,
		": c\n\n":                 true,
		"data: 1\n":               false,
		"data: 1\r\n":             false,
		"data: 1\r":               false,
		"data: 1":                 false,
		"data: 1\n\nd":            false,
		"data: 1\n\ndata: [DONE]": false,
		"a\n":                     false,
		"a":                       false,
	} {
		var x exchange
		for i := range s { // byte by byte, and at once
			x.tail = lastBytes(x.tail, []byte(s[i:i+1]))
		}
		if got := betweenEvents(x.tail, int64(len(s))); got != want {
			t.Errorf("%q bytewise: %v, want %v", s, got, want)
		}
		if got := betweenEvents(lastBytes([4]byte{}, []byte(s)), int64(len(s))); got != want {
			t.Errorf("%q: %v, want %v", s, got, want)
		}
	}
}
