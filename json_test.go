package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A foundMember is a member of an object: its decoded name and its value as it stands in the text.
type foundMember struct{ Name, Value string }

func scanMembers(data []byte) (members []foundMember, err error) {
	err = scanObject(data, func(name []byte, start, end int) error {
		members = append(members, foundMember{string(name), string(data[start:end])})
		return nil
	})
	return members, err
}

// richObject has everything that JSON has.
const richObject = " \t\r\n" + `{"model" : "qwen3-coder-plus", "a\u0062\n" :"x\"\\\/\b\f\n\r\t\u00e9\uD83D\uDE00\ud800y",` +
	`"numbers":[0,-0,12,3.25,-1.5e+10,2E-7,1e0],"literals":[true,false,null],"empty":{},"none":[ ],"":"",` +
	"\n  \"messages\": [ {\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"你好, ﷽ \xff\"}]} , {} ]," +
	`"model":null , "deep":[[[{"x":[{"y":[]}]}]]],"a long name without escapes":"a long string without escapes"}` + "\r\n"

func TestScanObject(t *testing.T) {
	deep := func(n int) string { return `{"a":` + strings.Repeat("[", n-1) + strings.Repeat("]", n-1) + `}` }
	tests := []struct {
		name, in string
		want     []foundMember
	}{
		{"no members", `{}`, nil},
		{"no members, white space", " { \n} ", nil},
		{"one member", `{"model":"qwen"}`, []foundMember{{"model", `"qwen"`}}},
		{"white space stays outside of the value", "{ \"a\" :\t[ 1 ]\r\n, \"b\":\n2 }", []foundMember{{"a", "[ 1 ]"}, {"b", "2"}}},
		{"repeated names in order", `{"a":1,"b":2,"a":3}`, []foundMember{{"a", "1"}, {"b", "2"}, {"a", "3"}}},
		{"only the outermost members", `{"a":{"b":{"c":1}},"d":[{"e":2}]}`, []foundMember{{"a", `{"b":{"c":1}}`}, {"d", `[{"e":2}]`}}},
		{"an escaped name", `{"mod\u0065l":1}`, []foundMember{{"model", "1"}}},
		{"a name with a surrogate pair", `{"\ud83d\ude00":1}`, []foundMember{{"😀", "1"}}},
		{"a name with half a surrogate pair", `{"\ud83d":1}`, []foundMember{{"\uFFFD", "1"}}},
		{"a name that is not UTF-8", "{\"\xff\":1}", []foundMember{{"\uFFFD", "1"}}},
		{"an empty name", `{"":""}`, []foundMember{{"", `""`}}},
		{"a value that is not UTF-8", "{\"a\":\"\xff\"}", []foundMember{{"a", "\"\xff\""}}},
		{"DEL is no control character", "{\"a\":\"\x7f\"}", []foundMember{{"a", "\"\x7f\""}}},
		{"numbers", `{"a":-0.0e-0,"b":0,"c":1E400}`, []foundMember{{"a", "-0.0e-0"}, {"b", "0"}, {"c", "1E400"}}},
		{"as deep as it goes", deep(maxDepth), []foundMember{{"a", strings.TrimSuffix(strings.TrimPrefix(deep(maxDepth), `{"a":`), "}")}}},
		{"everything", richObject, []foundMember{
			{"model", `"qwen3-coder-plus"`},
			{"ab\n", `"x\"\\\/\b\f\n\r\t\u00e9\uD83D\uDE00\ud800y"`},
			{"numbers", `[0,-0,12,3.25,-1.5e+10,2E-7,1e0]`},
			{"literals", `[true,false,null]`},
			{"empty", `{}`},
			{"none", `[ ]`},
			{"", `""`},
			{"messages", "[ {\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"你好, ﷽ \xff\"}]} , {} ]"},
			{"model", "null"},
			{"deep", `[[[{"x":[{"y":[]}]}]]]`},
			{"a long name without escapes", `"a long string without escapes"`},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := scanMembers([]byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("members (-want +got):\n%s", diff)
			}
		})
	}
}

func TestScanObjectErrors(t *testing.T) {
	tests := []struct {
		name, in, want string
		offset         int
	}{
		{"nothing", "", "the body is empty", 0},
		{"white space alone", " \r\n", "the body is empty", 3},
		{"byte order mark", "\xEF\xBB\xBF{}", "the body starts with a byte order mark: send UTF-8 without one", 0},
		{"UTF-16", "{\x00}\x00", "unexpected character at byte 1", 1},
		{"array", " [1]", "want a JSON object, got an array", 1},
		{"string", `"{}"`, "want a JSON object, got a string", 0},
		{"number", "-1.5", "want a JSON object, got a number", 0},
		{"true", "true", "want a JSON object, got a boolean", 0},
		{"false", "false", "want a JSON object, got a boolean", 0},
		{"null", "null", "want a JSON object, got null", 0},
		{"a form", "model=qwen", "unexpected character at byte 0", 0},
		{"a word that begins like null", "none", "unexpected character at byte 1", 1},
		{"half an array", "[1,", "unexpected end at byte 3", 3},
		{"trailing object", `{} {}`, "unexpected data after the JSON object at byte 3", 3},
		{"trailing bracket", `{"a":1}}`, "unexpected data after the JSON object at byte 7", 7},
		{"trailing NUL", "{}\x00", "unexpected data after the JSON object at byte 2", 2},
		{"end after the brace", `{`, "unexpected end at byte 1", 1},
		{"end in a name", `{"a`, "unexpected end at byte 3", 3},
		{"end after a name", `{"a" `, "unexpected end at byte 5", 5},
		{"end after a colon", `{"a": `, "unexpected end at byte 6", 6},
		{"end after a value", `{"a":1`, "unexpected end at byte 6", 6},
		{"end after a comma", `{"a":1,`, "unexpected end at byte 7", 7},
		{"end in an escape", `{"a":"\`, "unexpected end at byte 7", 7},
		{"end in a \\u escape", `{"a":"\u00`, "unexpected end at byte 10", 10},
		{"end in a literal", `{"a":tr`, "unexpected end at byte 7", 7},
		{"end in a number", `{"a":-`, "unexpected end at byte 6", 6},
		{"end in an array", `{"a":[1,[]`, "unexpected end at byte 10", 10},
		{"NUL", "{\x00}", "unexpected character at byte 1", 1},
		{"NUL for a value", "{\"a\":\x00}", "unexpected character at byte 5", 5},
		{"comma after the last member", `{"a":1,}`, "unexpected character at byte 7", 7},
		{"comma after the last element", `{"a":[1,]}`, "unexpected character at byte 8", 8},
		{"comma alone", `{,}`, "unexpected character at byte 1", 1},
		{"no comma between members", `{"a":1 "b":2}`, "unexpected character at byte 7", 7},
		{"no comma between elements", `{"a":[1 2]}`, "unexpected character at byte 8", 8},
		{"no colon", `{"a" 1}`, "unexpected character at byte 5", 5},
		{"no value", `{"a":}`, "unexpected character at byte 5", 5},
		{"name without quotes", `{a:1}`, "unexpected character at byte 1", 1},
		{"name in single quotes", `{'a':1}`, "unexpected character at byte 1", 1},
		{"number for a name", `{"a":{1:2}}`, "unexpected character at byte 6", 6},
		{"array closed by a brace", `{"a":[1}`, "unexpected character at byte 7", 7},
		{"object closed by a bracket", `{"a":{"b":1]}`, "unexpected character at byte 11", 11},
		{"comment", `{/**/}`, "unexpected character at byte 1", 1},
		{"form feed is no white space", "{\f}", "unexpected character at byte 1", 1},
		{"literal in capitals", `{"a":True}`, "unexpected character at byte 5", 5},
		{"literal too long", `{"a":nulls}`, "unexpected character at byte 9", 9},
		{"NaN", `{"a":NaN}`, "unexpected character at byte 5", 5},
		{"leading zero", `{"a":01}`, "unexpected character at byte 6", 6},
		{"leading plus", `{"a":+1}`, "unexpected character at byte 5", 5},
		{"leading point", `{"a":.5}`, "unexpected character at byte 5", 5},
		{"no digit after the point", `{"a":1.}`, "unexpected character at byte 7", 7},
		{"no digit in the exponent", `{"a":1e+}`, "unexpected character at byte 8", 8},
		{"unknown escape", `{"a":"\x"}`, "unexpected character at byte 7", 7},
		{"bad hexadecimal digit", `{"a":"\u00g0"}`, "unexpected character at byte 10", 10},
		{"newline in a string", "{\"a\":\"long enough to\nbreak\"}", "unescaped control character in a string at byte 20", 20},
		{"NUL in a string", "{\"a\":\"\x00\"}", "unescaped control character in a string at byte 6", 6},
		{"control character in a name", "{\"\x1f\":1}", "unescaped control character in a string at byte 2", 2},
		{"one level too deep", `{"a":` + strings.Repeat("[", maxDepth), "nested deeper than 10000 levels at byte 10004", 10004},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := scanObject([]byte(tt.in), func([]byte, int, int) error { return nil })
			want := &syntaxError{offset: tt.offset, message: tt.want}
			if diff := cmp.Diff(error(want), err, cmp.AllowUnexported(syntaxError{})); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

// Every byte must be told for what it is at every place within the words that skipString reads, beside bytes
// with the top bit set too.
func TestScanObjectStringBytes(t *testing.T) {
	for c := range 256 {
		for at := range 40 {
			data := []byte(`{"a":"` + strings.Repeat("\xe4x", 20) + `"}`)
			data[len(`{"a":"`)+at] = byte(c)
			if got, want := scanObject(data, func([]byte, int, int) error { return nil }) == nil, json.Valid(data); got != want {
				t.Errorf("byte %#02x at %d of a string: accepted %t, want %t", c, at, got, want)
			}
		}
	}
}

func TestScanObjectTruncated(t *testing.T) {
	whole := strings.TrimRight(richObject, "\r\n")
	for n := range len(whole) {
		_, err := scanMembers([]byte(whole[:n]))
		se, ok := errors.AsType[*syntaxError](err)
		if !ok || se.offset != n {
			t.Errorf("first %d bytes: error %v, want a syntaxError at byte %d", n, err, n)
		}
	}
}

func TestScanObjectMemberError(t *testing.T) {
	stop := errors.New("stop")
	var names []string
	err := scanObject([]byte(`{"a":1,"b":2,"c":`), func(name []byte, _, _ int) error {
		names = append(names, string(name))
		if string(name) == "b" {
			return stop
		}
		return nil
	})
	if err != stop {
		t.Errorf("error %v, want member's own", err)
	}
	if diff := cmp.Diff([]string{"a", "b"}, names); diff != "" {
		t.Errorf("members (-want +got):\n%s", diff)
	}
}

func TestScanObjectAllocs(t *testing.T) {
	data := chatBody(100<<10, codeText)
	allocs := testing.AllocsPerRun(100, func() {
		var model, stream []byte
		err := scanObject(data, func(name []byte, start, end int) error {
			switch string(name) {
			case "model":
				model = data[start:end]
			case "stream":
				stream = data[start:end]
			}
			return nil
		})
		if err != nil || string(model) != `"qwen3-coder-plus"` || string(stream) != "true" {
			t.Fatalf("model %s, stream %s, error %v", model, stream, err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations a run, want 0", allocs)
	}
}

// FuzzScanObject holds scanObject against encoding/json: both accept the same objects and find the same members.
func FuzzScanObject(f *testing.F) {
	f.Add([]byte(richObject))
	f.Add([]byte(`{"a":[{"b":"c"},[],{},-1.5e-3,true,false,null],"a\u0061":"\ud800\n"}`))
	f.Add([]byte("\xEF\xBB\xBF{}"))
	f.Add([]byte("{\"\xff\":\"\x1f\"} x"))
	f.Add([]byte(`[{"a":1}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		before := bytes.Clone(data)
		got, err := scanMembers(data)
		if !bytes.Equal(before, data) {
			t.Fatal("scanObject has changed its input")
		}
		isObject := json.Valid(data) && bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{"))
		if (err == nil) != isObject {
			t.Fatalf("error %v for %q, an object for encoding/json: %t", err, data, isObject)
		}
		if err != nil {
			se, ok := errors.AsType[*syntaxError](err)
			if !ok || se.offset < 0 || se.offset > len(data) {
				t.Fatalf("error %#v for %q, want a syntaxError with an offset in 0..%d", err, data, len(data))
			}
			return
		}
		if diff := cmp.Diff(decodeMembers(t, data), got); diff != "" {
			t.Errorf("members of %q (-want +got):\n%s", data, diff)
		}
	})
}

// decodeMembers returns the members of data, a JSON object, as a json.Decoder finds them.
func decodeMembers(t *testing.T, data []byte) (members []foundMember) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		t.Fatalf("first token %v, error %v", tok, err)
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			t.Fatal(err)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			t.Fatal(err)
		}
		members = append(members, foundMember{name.(string), string(value)})
	}
	if tok, err := dec.Token(); err != nil || tok != json.Delim('}') {
		t.Fatalf("last token %v, error %v", tok, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		t.Fatalf("after the object: error %v, want EOF", err)
	}
	return members
}

// Alphabets for chatBody: the pieces of its text.
var (
	codeText    = strings.Split("func |add(a, |b int) |error |{\n|\t|return |if err != nil |}\n|// Prints |\"quoted\" |fmt.Println(|x + y)\n|the |of |number ", "|")
	chineseText = strings.Split("通义千问是阿里云研发的大语言模型能够回答题创作文字还表达观点撰写代码，。\n", "")
)

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

func BenchmarkScanObject(b *testing.B) {
	image, err := json.Marshal("data:image/png;base64," + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte("\x89PNG\r\n\x1a\nIHDR"), 64<<10)))
	if err != nil {
		b.Fatal(err)
	}
	tool := `{"type":"function","function":{"name":"read_file","description":"Reads a file.","strict":false,"parameters":` +
		`{"type":"object","properties":{"path":{"type":"string"},"limit":{"type":"integer","minimum":1}},"required":["path"]}}}`
	var tools bytes.Buffer
	if err := json.Indent(&tools, []byte(`{"tools":[`+strings.Repeat(tool+",", 120)+tool+`]}`), "", "  "); err != nil {
		b.Fatal(err)
	}
	bodies := []struct {
		name string
		data []byte
	}{
		{"2KB chat", chatBody(2<<10, codeText)},
		{"100KB chat", chatBody(100<<10, codeText)},
		{"100KB Chinese", chatBody(100<<10, chineseText)},
		{"100KB escaped Chinese", asciiJSON(chatBody(50<<10, chineseText))},
		{"1MB base64", []byte(`{"model":"qwen-vl","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":` + string(image) + `}}]}]}`)},
		{"100KB tool schemas", tools.Bytes()},
	}
	for _, body := range bodies {
		b.Run(body.name+"/scanObject", func(b *testing.B) {
			b.SetBytes(int64(len(body.data)))
			b.ReportAllocs()
			for b.Loop() {
				members := 0
				err := scanObject(body.data, func([]byte, int, int) error {
					members++
					return nil
				})
				if err != nil || members == 0 {
					b.Fatalf("%d members, error %v", members, err)
				}
			}
		})
		b.Run(body.name+"/json.Valid", func(b *testing.B) {
			b.SetBytes(int64(len(body.data)))
			b.ReportAllocs()
			for b.Loop() {
				if !json.Valid(body.data) {
					b.Fatal("not valid")
				}
			}
		})
	}
}

// asciiJSON writes what is not ASCII as \u escapes, as Python's json.dumps does unless told otherwise.
func asciiJSON(data []byte) []byte {
	var b bytes.Buffer
	for _, r := range string(data) {
		if r < 0x80 {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, `\u%04x`, r) // of the basic plane, in these benchmarks
		}
	}
	return b.Bytes()
}
