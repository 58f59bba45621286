package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// modelsFresh is how long the upstream's list is kept.
	modelsFresh = 5 * time.Minute
	// modelsRetry is how long the proxy waits after a failure before it asks the upstream again.
	modelsRetry = 30 * time.Second
	// modelsTimeout bounds the wait for the upstream's list. It is short: there is a list to fall back on.
	modelsTimeout = 10 * time.Second
	// maxModels bounds the upstream's list, in bytes.
	maxModels = 4 << 20
)

// The models listed if neither the upstream nor MODELS names any. Accounts differ in the models that they may use.
var (
	oauthModels = []string{"coder-model", "qwen3-coder-plus", "qwen3-coder-flash", "vision-model"}
	keyModels   = []string{"qwen3-coder-plus", "qwen3-coder-flash", "qwen3.6-plus", "qwen3.7-plus", "qwen3.7-max", "qwen3.8-flash", "text-embedding-v4"}
)

// models handles GET /v1/models and /v1/models/{id}. With an API key it answers with the upstream's list. Under OAuth, or if the
// upstream gives no list, it answers with MODELS or the built-in list. It never starts a sign-in.
type models struct {
	tokens    tokenSource
	transport http.RoundTripper
	log       *slog.Logger
	aliases   []string

	fixed   *modelList                // where the upstream has none
	current atomic.Pointer[modelList] // the upstream's, or fixed; nil before the first request
	asking  chan struct{}             // 1 slot; held while current is replaced
	failure string                    // the error logged last; "" after a success; guarded by asking
}

// A modelList is a list of models as it is answered, with all aliases. It does not change.
type modelList struct {
	body  []byte                     // the list object of OpenAI's API
	byID  map[string]json.RawMessage // the model objects
	until time.Time                  // when the upstream is to be asked again
}

func newModels(cfg *config, tokens tokenSource, transport http.RoundTripper, log *slog.Logger) *models {
	ids := cfg.models
	if len(ids) == 0 {
		ids = oauthModels
		if cfg.apiKey != "" {
			ids = keyModels
		}
		ids = append(slices.Clone(ids), cfg.defaultModel)
	}
	m := &models{tokens: tokens, transport: transport, log: log, aliases: slices.Sorted(maps.Keys(cfg.aliases)), asking: make(chan struct{}, 1)}
	var own []json.RawMessage
	for _, id := range ids {
		own = append(own, ownModel(id))
	}
	m.fixed = m.newList(own)
	if cfg.apiKey == "" {
		m.fixed.until = time.Now().AddDate(1000, 0, 0)
		m.current.Store(m.fixed)
	}
	return m
}

// ownModel returns the model object of a model that the upstream has not listed.
func ownModel(id string) json.RawMessage {
	b, err := json.Marshal(struct {
		ID      string `json:"id"`
		Object  string `json:"object"`
		Created int64  `json:"created"` // Unix seconds
		OwnedBy string `json:"owned_by"`
	}{id, "model", 1753142400, "qwen"}) // 2025-07-22, the release of qwen3-coder
	if err != nil {
		panic(err) // strings and a number always marshal
	}
	return b
}

// modelID returns the id of a model object, "" if it has none.
func modelID(object json.RawMessage) string {
	var named struct{ ID string }
	json.Unmarshal(object, &named) // anything else than an object whose id is a string has no id
	return named.ID
}

// newList returns the list of the model objects and the aliases. It leaves out objects without an id and repeated ids.
func (m *models) newList(objects []json.RawMessage) *modelList {
	l := &modelList{byID: map[string]json.RawMessage{}}
	list := struct {
		Object string            `json:"object"`
		Data   []json.RawMessage `json:"data"`
	}{"list", []json.RawMessage{}}
	add := func(id string, object json.RawMessage) {
		if _, ok := l.byID[id]; !ok && id != "" {
			l.byID[id] = object
			list.Data = append(list.Data, object)
		}
	}
	for _, object := range objects {
		add(modelID(object), object)
	}
	for _, alias := range m.aliases {
		add(alias, ownModel(alias))
	}
	var err error
	if l.body, err = json.Marshal(list); err != nil {
		panic(err) // the parts were valid JSON
	}
	return l
}

// list returns the current list. Concurrent requests ask the upstream once.
func (m *models) list(ctx context.Context) *modelList {
	if l := m.current.Load(); l != nil && time.Now().Before(l.until) {
		return l
	}
	select {
	case m.asking <- struct{}{}:
		defer func() { <-m.asking }()
	case <-ctx.Done():
		return m.fixed // the client has left
	}
	last := m.current.Load()
	if last != nil && time.Now().Before(last.until) {
		return last
	}
	objects, err := m.ask(context.WithoutCancel(ctx)) // others wait for it
	var next modelList
	switch {
	case err == nil:
		next = *m.newList(objects)
		next.until = time.Now().Add(modelsFresh)
		m.failure = ""
	default:
		if next = *m.fixed; last != nil {
			next = *last
		}
		next.until = time.Now().Add(modelsRetry)
		if err.Error() != m.failure {
			m.failure = err.Error()
			m.log.Warn("the list of models can't be fetched from Qwen; the previous list, MODELS or the built-in list is used", "error", err)
		}
	}
	m.current.Store(&next)
	return &next
}

// ask returns the upstream's model objects, at least one of which has an id.
func (m *models) ask(ctx context.Context) ([]json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, modelsTimeout)
	defer cancel()
	t, err := m.tokens.Token(ctx)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.base.String()+"/models", nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", t.authorization)
	req.Header.Set("User-Agent", userAgent)
	res, err := m.transport.RoundTrip(req) // follows no redirects
	if err != nil {
		return nil, t.redactError(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s/models answered with status %d", t.base, res.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, maxModels))
	if err != nil {
		return nil, err
	}
	var list struct{ Data []json.RawMessage }
	if err := json.Unmarshal(b, &list); err != nil || !slices.ContainsFunc(list.Data, func(o json.RawMessage) bool { return modelID(o) != "" }) {
		return nil, errors.Join(fmt.Errorf("%s/models did not answer with a list of models", t.base), err)
	}
	return list.Data, nil
}

// all handles GET /v1/models.
func (m *models) all(x *exchange, r *http.Request) error {
	writeBody(x, http.StatusOK, m.list(r.Context()).body)
	return nil
}

// one handles GET /v1/models/{id}.
func (m *models) one(x *exchange, r *http.Request) error {
	_, id, _ := strings.Cut(r.URL.Path, "/models/")
	model, ok := m.list(r.Context()).byID[id]
	if !ok {
		return &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "model_not_found", param: "model",
			message: fmt.Sprintf("The model %q does not exist. GET /v1/models lists those there are.", clip(id, 100))}
	}
	writeBody(x, http.StatusOK, model)
	return nil
}
