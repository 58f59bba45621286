package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func testBodies(largest, memory int64) *bodyReader {
	b := newBodyReader(&config{maxBody: largest, maxBuffered: memory, readTimeout: time.Minute})
	return &b
}

// readBody has b read a body that comes from r.
func readBody(b *bodyReader, r io.Reader) (*requestBody, error) {
	w := &discard{http.Header{}}
	return b.read(&exchange{answerWriter: answerWriter{w: w, rc: http.NewResponseController(w)}}, httptest.NewRequest("POST", "/", r))
}

// wantHeld checks what is charged.
func wantHeld(t *testing.T, b *bodyReader, least, most int64) {
	t.Helper()
	if n := b.memory.held.Load(); n < least || n > most {
		t.Errorf("%d bytes are charged, want %d to %d", n, least, most)
	}
}

func isOverloaded(err error) bool {
	e, ok := errors.AsType[*apiError](err)
	return ok && e.status == http.StatusServiceUnavailable && e.retryAfter > 0
}

func TestBodiesShareABudget(t *testing.T) {
	b := testBodies(1<<20, 8<<20)
	large := strings.Repeat("x", 1<<20)
	small := large[:smallShare]
	var held []*requestBody
	for {
		body, err := readBody(b, strings.NewReader(large))
		if isOverloaded(err) {
			break
		} else if err != nil || len(held) == 8 {
			t.Fatalf("after %d bodies of 1 MiB: %v", len(held), err)
		}
		held = append(held, body)
	}
	if len(held) != 6 {
		t.Errorf("%d large bodies fit into seven eighths of 8 MiB, want 6", len(held))
	}
	beside := 0
	for ; beside < 100; beside++ {
		body, err := readBody(b, iotest.OneByteReader(strings.NewReader(small)))
		if isOverloaded(err) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		held = append(held, body)
	}
	if beside < 5 {
		t.Errorf("%d small bodies fit beside the large ones, want 5 at least", beside)
	}
	wantHeld(t, b, 7<<20, 8<<20)
	for _, body := range held {
		body.release()
		body.release()
	}
	wantHeld(t, b, 0, 0)
}

// TestALargestBodyAlwaysFits: MAX_BUFFERED_BYTES may be as small as MAX_BODY_BYTES.
func TestALargestBodyAlwaysFits(t *testing.T) {
	for _, size := range []int{0, 1, smallBody - 1, smallBody, smallBody + 1, smallShare, smallShare + 1, spareSize - 1, spareSize, spareSize + 1, 1000000} {
		b := testBodies(int64(size), int64(size))
		text := strings.Repeat("x", size)
		for name, r := range map[string]io.Reader{
			"announced":     strings.NewReader(text),
			"not announced": struct{ io.Reader }{strings.NewReader(text)},
			"in halves":     iotest.DataErrReader(iotest.HalfReader(strings.NewReader(text))),
		} {
			body, err := readBody(b, r)
			if err != nil || string(body.data) != text {
				t.Errorf("%d bytes, %s: %v", size, name, err)
				continue
			}
			body.release()
			if _, err := readBody(b, io.MultiReader(strings.NewReader(text), strings.NewReader("y"))); err == nil {
				t.Errorf("%d bytes and one more are taken", size)
			}
			wantHeld(t, b, 0, 0)
		}
	}
}

func TestEditsOfABody(t *testing.T) {
	for _, size := range []int{10, smallBody - 1, 100000} {
		b := testBodies(1<<20, 1<<20)
		text := "0123456789" + strings.Repeat("x", size-10)
		body, err := readBody(b, strings.NewReader(text))
		fatalIf(t, err)
		body.replace(size, size, "the end")
		body.replace(4, 6, "FOUR")
		body.replace(0, 1, "first")
		want := "first123FOUR6789" + text[10:] + "the end"
		for range 2 {
			r := body.open()
			if err := iotest.TestReader(struct{ io.Reader }{r}, []byte(want)); err != nil {
				t.Errorf("of %d bytes: %v", size, err)
			}
			r.Close()
		}
		body.release()
	}
}

// TestABodyOutlivesItsHandler: a transport may read on, or close in the middle of a read, when the handler has
// returned and the memory goes to the next request.
func TestABodyOutlivesItsHandler(t *testing.T) {
	b := testBodies(1<<20, 1<<30)
	var wg sync.WaitGroup
	for i := range 200 {
		letter := byte('a' + i%26)
		body, err := readBody(b, bytes.NewReader(bytes.Repeat([]byte{letter}, smallBody+1+i%100*5000)))
		fatalIf(t, err)
		size := len(body.data)
		whole, closed := body.open(), body.open()
		wg.Go(func() {
			defer whole.Close()
			got, err := io.ReadAll(whole)
			if n := len(bytes.Trim(got, string(letter))); n != 0 {
				t.Errorf("%d bytes of another body", n)
			}
			if err == nil && len(got) != size {
				t.Errorf("%d bytes of %d look whole", len(got), size)
			}
		})
		wg.Go(func() { io.Copy(io.Discard, closed) })
		wg.Go(func() { closed.Close(); closed.Close() })
		wg.Go(func() {
			body.answerBegan()
			body.release()
		})
		if i%10 == 0 {
			wg.Wait()
		}
	}
	wg.Wait()
	wantHeld(t, b, 0, 0)
	if len(b.memory.spares) == 0 {
		t.Error("no memory is kept for the next body")
	}
}

// TestEveryWayOutGivesTheMemoryBack: whatever ends a request, and whoever still reads its body.
func TestEveryWayOutGivesTheMemoryBack(t *testing.T) {
	t.Parallel()
	kinds := map[string]http.HandlerFunc{
		"whole": func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			answerJSON(w, 200, "{}")
		},
		"stream": func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			sse(w, "data: 1\n\n")
			<-r.Context().Done()
		},
		"unread": func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-r.Context().Done():
			case <-time.After(300 * time.Millisecond): // over HTTP/1.1 only a server that reads sees its client leave
			}
		},
		"early": func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 400, "{}") },
		"broken": func(w http.ResponseWriter, r *http.Request) {
			io.CopyN(io.Discard, r.Body, 10000)
			panic(http.ErrAbortHandler)
		},
	}
	for _, http2 := range []bool{false, true} {
		api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			kind, _, _ := strings.Cut(r.Header.Get("X-Request-Id"), ".")
			kinds[kind](w, r)
		}))
		api.EnableHTTP2 = http2
		api.Config.ErrorLog = log.New(io.Discard, "", 0)
		api.StartTLS()
		defer api.Close()
		cfg, err := loadConfig(lookup(map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": api.URL + "/v1", "RATE_LIMIT_RPS": "0"}))
		fatalIf(t, err)
		transport := newTransport()
		transport.TLSClientConfig = api.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
		defer transport.CloseIdleConnections()
		quiet := slog.New(slog.DiscardHandler)
		p := newProxy(cfg, newSource(cfg, quiet, io.Discard), newMetrics(), transport)
		srv := httptest.NewServer(track(cfg, quiet, p.metrics, p.forward("/chat/completions", "messages")))
		defer srv.Close()

		var clients sync.WaitGroup
		for kind := range kinds {
			for i, size := range []int{100, 20000, 300000, 2000000, 100, 20000, 300000, 2000000} {
				clients.Go(func() {
					ctx, leave := context.WithTimeout(t.Context(), time.Duration(100+20*i)*time.Millisecond)
					defer leave()
					var body io.Reader = strings.NewReader(`{"messages":["` + strings.Repeat("x", size) + `"]}`)
					if i >= 4 { // chunked, and the client leaves in the middle
						body = io.MultiReader(io.LimitReader(body, int64(size/2)), blockedReader{ctx})
					}
					req, _ := http.NewRequestWithContext(ctx, "POST", srv.URL, body)
					req.Header.Set("X-Request-ID", kind+".1")
					if res, err := http.DefaultClient.Do(req); err == nil {
						io.Copy(io.Discard, res.Body)
						res.Body.Close()
					}
				})
			}
		}
		clients.Wait()
		until(t, fmt.Sprintf("nothing is charged, HTTP/2 %t", http2), func() bool { return p.bodies.memory.held.Load() == 0 })
	}
}

// A blockedReader brings nothing until its request ends.
type blockedReader struct{ ctx context.Context }

func (b blockedReader) Read([]byte) (int, error) {
	<-b.ctx.Done()
	return 0, b.ctx.Err()
}

// A slowBody is a body of which a piece comes after each pause.
type slowBody struct {
	ctx          context.Context // of the request, which ends its pauses
	pieces, size int
	pause        time.Duration
	end          time.Duration // of silence before the end
	sent         int
}

func (s *slowBody) Read(p []byte) (int, error) {
	if s.sent == s.pieces {
		sleep(s.ctx, s.end)
		return copy(p, `"]}`), io.EOF
	}
	n := copy(p[:min(len(p), s.size)], bytes.Repeat([]byte("x"), s.size))
	if s.sent == 0 {
		copy(p, `{"messages":["`)
	}
	s.sent++
	sleep(s.ctx, s.pause)
	return n, nil
}

func TestASlowBodyPassesWhileItComes(t *testing.T) {
	for _, tt := range []struct {
		name string
		body slowBody
		want int
		took time.Duration
	}{
		{"1.6 MB in seven minutes", slowBody{pieces: 400, size: readQuantum, pause: 1100 * time.Millisecond}, 200, 500 * time.Second},
		{"a large one that comes as slowly", slowBody{pieces: 5000, size: readQuantum, pause: 1100 * time.Millisecond}, 408, 532 * time.Second},
		{"each piece at the last moment", slowBody{pieces: 10, size: readQuantum, pause: 29 * time.Second}, 200, 350 * time.Second},
		{"one that stops", slowBody{pieces: 2500, size: readQuantum, end: time.Hour}, 408, 30 * time.Second},
		{"a drip", slowBody{pieces: 1000, size: 10, pause: 700 * time.Millisecond}, 408, 30 * time.Second},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
			b := inBubble(t, nil, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				time.Sleep(time.Minute) // no deadline is left over from the body
				answerJSON(w, 200, "{}")
			})
			started := time.Now()
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			tt.body.ctx = ctx
			req, err := http.NewRequestWithContext(ctx, "POST", "http://proxy/v1/chat/completions", &tt.body)
			fatalIf(t, err)
			res, err := b.client.Do(req)
			fatalIf(t, err)
			defer res.Body.Close()
			if body, _ := io.ReadAll(res.Body); res.StatusCode != tt.want {
				t.Errorf("%s %s, want %d", res.Status, body, tt.want)
			}
			if took := time.Since(started).Round(time.Second); took != tt.took {
				t.Errorf("it took %v, want %v", took, tt.took)
			}
		})
	}
}

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
			fatalIf(t, err)
			wantEqual(t, "members", tt.want, got)
		})
	}
}

func TestFindMembersErrors(t *testing.T) {
	const notObject = "want a JSON object: UTF-8 text that begins with {, without a byte order mark"
	tests := []struct{ name, in, want string }{
		{"nothing", "", notObject},
		{"white space alone", " \r\n", notObject},
		{"byte order mark", "\xEF\xBB\xBF{}", notObject},
		{"UTF-16", "{\x00}\x00", "unexpected character at byte 1"},
		{"array", " [1]", notObject},
		{"string", `"{}"`, notObject},
		{"null", "null", notObject},
		{"a form", "model=qwen", notObject},
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
			wantEqual(t, "error", want, err, cmp.AllowUnexported(apiError{}))
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
			if !(0 < m.name && m.name < m.start && m.start < m.end && m.end <= end) {
				t.Errorf("%s of %q is at %+v", wanted[i], data, m)
			}
			if rest := bytes.TrimLeft(data[m.end:], " \t\r\n"); rest[0] != ',' && rest[0] != '}' {
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
		wantEqual(t, fmt.Sprintf("members of %q", data), want, got)
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
		fatalIf(t, err)
		var value json.RawMessage
		fatalIf(t, dec.Decode(&value))
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
