package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// wanted are the names that the tests look for.
var wanted = []string{"model", "stream", "messages", "a"}

// findValues returns the values of the wanted members of data by name, as they stand in the text.
func findValues(data []byte) (map[string]string, error) {
	found, err := findMembers(data, wanted...)
	if err != nil {
		return nil, err
	}
	values := map[string]string{}
	for i, m := range found {
		if m.end != 0 {
			values[wanted[i]] = string(data[m.start:m.end])
		}
	}
	return values, nil
}

// richObject has everything that JSON has.
const richObject = " \t\r\n" + `{"model" : "qwen3-coder-plus", "a\u0062\n" :"x\"\\\/\b\f\n\r\t\u00e9\uD83D\uDE00\ud800y",` +
	`"numbers":[0,-0,12,3.25,-1.5e+10,2E-7,1e0],"literals":[true,false,null],"empty":{},"none":[ ],"":"",` +
	"\n  \"messages\": [ {\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"你好, ﷽ \xff\"}]} , {} ]," +
	`"Model":null , "deep":[[[{"x":[{"y":[]}]}]]],"a long name without escapes":"a long string without escapes"}` + "\r\n"

func TestFindMembers(t *testing.T) {
	deep := strings.Repeat("[", 1<<20) + strings.Repeat("]", 1<<20)
	type values = map[string]string
	tests := []struct {
		name, in string
		want     values
	}{
		{"no members", `{}`, values{}},
		{"no members, white space", " { \n} ", values{}},
		{"one member", `{"model":"qwen"}`, values{"model": `"qwen"`}},
		{"white space stays outside of the value", "{ \"a\" :\t[ 1 ]\r\n, \"stream\":\n2 }", values{"a": "[ 1 ]", "stream": "2"}},
		{"only the outermost members", `{"x":{"model":{"stream":1}},"a":[{"model":2}]}`, values{"a": `[{"model":2}]`}},
		{"an escaped name", `{"mod\u0065l":1,"\u0061":2,"\u006D\u0065\u0073\u0073\u0061\u0067\u0065\u0073":3}`, values{"model": "1", "a": "2", "messages": "3"}},
		{"names that look alike", `{"Model":1,"mode":2,"models":3,"mod\u0065":4,"model\u0000":5,"\u016dodel":6,"mod\\u0065l":7,"\/model":8,"":9,"mod\u0065l\"":10}`, values{}},
		{"a name that is not UTF-8", "{\"\xff\":1}", values{}},
		{"strings with quotes and backslashes", `{"x":"\\","a":"\\\"}{","y":"\"","model":"\\\\"}`, values{"a": `"\\\"}{"`, "model": `"\\\\"`}},
		{"brackets in strings", `{"x":["]}",{"[{":"\"]"}],"a":1}`, values{"a": "1"}},
		{"numbers", `{"a":-0.0e-0,"model":0,"stream":1E+400}`, values{"a": "-0.0e-0", "model": "0", "stream": "1E+400"}},
		{"a million brackets", `{"a":` + deep + `}`, values{"a": deep}},
		{"everything", richObject, values{
			"model":    `"qwen3-coder-plus"`,
			"messages": "[ {\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"你好, ﷽ \xff\"}]} , {} ]",
		}},

		// What is inside values is for Qwen to judge.
		{"brackets that don't match", `{"a":[1},"model":2}`, values{"a": "[1}", "model": "2"}},
		{"elements that are none", `{"a":[1 2,,nul],"stream":tru}`, values{"a": "[1 2,,nul]", "stream": "tru"}},
		{"control characters in a string", "{\"a\":\"\x00\n\"}", values{"a": "\"\x00\n\""}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := findValues([]byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("members (-want +got):\n%s", diff)
			}
		})
	}
}

func TestFindMembersErrors(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"nothing", "", "the body is empty"},
		{"white space alone", " \r\n", "the body is empty"},
		{"byte order mark", "\xEF\xBB\xBF{}", "the body starts with a byte order mark: send UTF-8 without one"},
		{"UTF-16", "{\x00}\x00", "unexpected character at byte 1"},
		{"array", " [1]", "want a JSON object, got an array"},
		{"string", `"{}"`, "want a JSON object, which begins with {"},
		{"null", "null", "want a JSON object, which begins with {"},
		{"a form", "model=qwen", "want a JSON object, which begins with {"},
		{"trailing object", `{} {}`, "unexpected data after the JSON object at byte 3"},
		{"trailing bracket", `{"a":1}}`, "unexpected data after the JSON object at byte 7"},
		{"trailing NUL", "{}\x00", "unexpected data after the JSON object at byte 2"},
		{"end after a name", `{"a" `, "unexpected end at byte 5"},
		{"end in an escape", `{"a":"\`, "unexpected end at byte 7"},
		{"end in an array", `{"a":[1,[]`, "unexpected end at byte 10"},
		{"a string that its backslash keeps open", `{"a":"\\\"}`, "unexpected end at byte 11"},
		{"comma after the last member", `{"a":1,}`, "unexpected character at byte 7"},
		{"comma alone", `{,}`, "unexpected character at byte 1"},
		{"no comma between members", `{"a":1 "b":2}`, "unexpected character at byte 7"},
		{"no colon", `{"a" 1}`, "unexpected character at byte 5"},
		{"no value", `{"a":}`, "unexpected character at byte 5"},
		{"name without quotes", `{a:1}`, "unexpected character at byte 1"},
		{"name in single quotes", `{'a':1}`, "unexpected character at byte 1"},
		{"value in single quotes", `{"a":'x'}`, "unexpected character at byte 5"},
		{"comment", `{/**/}`, "unexpected character at byte 1"},
		{"form feed is no white space", "{\f}", "unexpected character at byte 1"},
		{"NUL for a value", "{\"a\":\x00}", "unexpected character at byte 5"},
		{"Python's True", `{"a":True}`, "unexpected character at byte 5"},
		{"an object closed by a bracket", `{"a":1]`, "unexpected character at byte 6"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := findMembers([]byte(tt.in), wanted...)
			want := badJSON("%s", tt.want)
			if diff := cmp.Diff(want, err, cmp.AllowUnexported(apiError{})); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
	for _, in := range []string{`{"a":1,"b":2,"a":3}`, `{"a":1,"\u0061":2}`} {
		_, err := findMembers([]byte(in), wanted...)
		if e, ok := errors.AsType[*apiError](err); !ok || e.code != "duplicate_member" || e.param != "a" {
			t.Errorf("%s: %v, want a duplicate_member", in, err)
		}
	}
	if _, err := findMembers([]byte(`{"b":1,"b":2}`), wanted...); err != nil {
		t.Errorf("a name that nobody wants twice: %v", err)
	}
}

func TestABodyCutShortIsRefused(t *testing.T) {
	whole := strings.TrimRight(richObject, "\r\n")
	for n := range len(whole) {
		if _, err := findMembers([]byte(whole[:n]), wanted...); err == nil {
			t.Errorf("the first %d bytes are taken for an object", n)
		}
	}
}

// TestFindMembersTakesNoMemory has bodies that grow in a decoder.
func TestFindMembersTakesNoMemory(t *testing.T) {
	for name, data := range map[string]string{
		"chat":          string(chatBody(100<<10, codeText)),
		"brackets":      `{"a":` + strings.Repeat("[", 1<<19) + strings.Repeat("]", 1<<19) + "}",
		"a long name":   `{"` + strings.Repeat("\xff", 1<<20) + `":1}`,
		"many escapes":  `{"` + strings.Repeat(`\u0061`, 1<<18) + `":1}`,
		"many members":  `{` + strings.Repeat(`"\u006dodem":1,`, 1<<16) + `"a":1}`,
		"a long string": `{"model":"` + strings.Repeat("\xff", 1<<20) + `"}`,
	} {
		body := []byte(data)
		allocs := testing.AllocsPerRun(5, func() {
			if _, err := findMembers(body, "model", "stream", "messages"); err != nil {
				t.Fatal(err)
			}
		})
		if allocs > 1 {
			t.Errorf("%s: %v allocations, want one, for the result", name, allocs)
		}
	}
}

// FuzzFindMembers compares findMembers with encoding/json: in a valid object both find the same members.
func FuzzFindMembers(f *testing.F) {
	f.Add([]byte(richObject))
	f.Add([]byte(`{"a":[{"b":"c"},[],{},-1.5e-3,true,false,null],"model\u0061":"\ud800\n\\"}`))
	f.Add([]byte("\xEF\xBB\xBF{}"))
	f.Add([]byte("{\"\xff\":\"\x1f\"} x"))
	f.Add([]byte(`[{"a":1}]`))
	f.Add([]byte(`{"\u0061":[1}, "stream":"\\\"" ,"messages":nul}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		before := bytes.Clone(data)
		found, err := findMembers(data, wanted...)
		if !bytes.Equal(before, data) {
			t.Fatal("findMembers has changed its input")
		}
		e, _ := errors.AsType[*apiError](err)
		if err != nil && (e == nil || e.status != 400 || found != nil) {
			t.Fatalf("%v and %v for %q, want an apiError alone", found, err, data)
		}
		end := bytes.LastIndexByte(data, '}')
		for i, m := range found {
			if m.end == 0 {
				continue
			}
			if !(0 < m.name && m.name < m.start && m.start < m.end && m.end <= m.next && m.next <= end) {
				t.Errorf("%s of %q is at %+v", wanted[i], data, m)
			}
			if rest := bytes.TrimLeft(data[m.end:m.next], " \t\r\n"); (m.next == end) != (len(rest) == 0) || len(rest) > 0 && rest[0] != ',' {
				t.Errorf("%s of %q: %q follows", wanted[i], data, rest)
			}
		}
		if !json.Valid(data) || !bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")) {
			return
		}
		want, twice := decodeMembers(t, data)
		if twice || err != nil {
			if !twice || e == nil || e.code != "duplicate_member" {
				t.Fatalf("%v for %q, in which a name is there twice: %t", err, data, twice)
			}
			return
		}
		got, _ := findValues(data)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("members of %q (-want +got):\n%s", data, diff)
		}
	})
}

// decodeMembers returns the wanted members of data, a JSON object, as a json.Decoder finds them, and whether one is there
// twice.
func decodeMembers(t *testing.T, data []byte) (members map[string]string, twice bool) {
	t.Helper()
	members = map[string]string{}
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		t.Fatalf("first token %v, error %v", tok, err)
	}
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			t.Fatal(err)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			t.Fatal(err)
		}
		name := tok.(string)
		if !slices.Contains(wanted, name) {
			continue
		}
		if _, ok := members[name]; ok {
			twice = true
		}
		members[name] = string(value)
	}
	return members, twice
}

// codeText is an alphabet for chatBody: the pieces of its text.
var codeText = strings.Split("func |add(a, |b int) |error |{\n|\t|return |if err != nil |}\n|// Prints |\"quoted\" |fmt.Println(|x + y)\n|the |of |number ", "|")

// chatBody returns a streaming chat request of about size bytes, in messages of some 2 KB. Their text is random,
// for a processor learns the places of the escapes in a text that repeats; it is the same at every call.
func chatBody(size int, alphabet []string) []byte {
	random := rand.New(rand.NewPCG(1, 2))
	var b bytes.Buffer
	b.WriteString(`{"model":"qwen3-coder-plus","messages":[{"role":"system","content":"You are a helpful assistant."}`)
	for b.Len() < size-1024 {
		var text strings.Builder
		for text.Len() < min(2048, size-b.Len()) {
			text.WriteString(alphabet[random.IntN(len(alphabet))])
		}
		quoted, err := json.Marshal(text.String())
		if err != nil {
			panic(err) // a string always marshals
		}
		fmt.Fprintf(&b, `,{"role":"user","content":%s}`, quoted)
	}
	b.WriteString(`],"temperature":0.7,"max_tokens":4096,"stream":true,"stream_options":{"include_usage":true}}`)
	return b.Bytes()
}
