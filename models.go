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
	"time"
)

const (
	// modelsFresh is how long the upstream's list is kept.
	modelsFresh = 5 * time.Minute
	// modelsRetry is how long the proxy waits after a failure before it asks the upstream again.
	modelsRetry = 30 * time.Second
	// modelsTimeout bounds the wait for the upstream's list. It is short, because there is another list to use.
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
	upstream  bool // the upstream has a list

	turn    chan struct{}     // 1 slot: guards what follows, and is held while the upstream is asked
	list    []json.RawMessage // model objects, each with an id of its own
	until   time.Time         // when the upstream is to be asked again
	failure string            // the error logged last; "" after a success
}

func newModels(cfg *config, tokens tokenSource, transport http.RoundTripper, log *slog.Logger) *models {
	m := &models{tokens: tokens, transport: transport, log: log, aliases: slices.Sorted(maps.Keys(cfg.aliases)), upstream: cfg.apiKey != "",
		turn: make(chan struct{}, 1)}
	ids := cfg.models
	if len(ids) == 0 {
		builtIn := oauthModels
		if m.upstream {
			builtIn = keyModels
		}
		ids = append(slices.Clone(builtIn), cfg.defaultModel)
	}
	var own []json.RawMessage
	for _, id := range ids {
		own = append(own, ownModel(id))
	}
	m.list = m.withAliases(own)
	return m
}

// ownModel returns the model object of a model that the upstream has not listed.
func ownModel(id string) json.RawMessage {
	const created = 1753142400 // Unix seconds: 2025-07-22, the release of qwen3-coder
	return fmt.Appendf(nil, `{"id":%s,"object":"model","created":%d,"owned_by":"qwen"}`, jsonString(id), created)
}

// modelID returns the id of a model object, "" if it has none.
func modelID(object json.RawMessage) string {
	var named struct{ ID string }
	json.Unmarshal(object, &named) // anything else than an object whose id is a string has no id
	return named.ID
}

// withAliases returns objects and the aliases, without objects that have no id and without repeated ids.
func (m *models) withAliases(objects []json.RawMessage) (list []json.RawMessage) {
	listed := map[string]bool{"": true}
	for _, alias := range m.aliases {
		objects = append(objects, ownModel(alias))
	}
	for _, object := range objects {
		if id := modelID(object); !listed[id] {
			listed[id] = true
			list = append(list, object)
		}
	}
	return list
}

// current returns the list to answer with, nil if ctx ends first. Concurrent requests ask the upstream once.
func (m *models) current(ctx context.Context) []json.RawMessage {
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	case <-ctx.Done():
		return nil // the client has left
	}
	if !m.upstream || time.Now().Before(m.until) {
		return m.list
	}
	objects, err := m.ask(context.WithoutCancel(ctx)) // others wait for it too
	if err != nil {
		m.until = time.Now().Add(modelsRetry)
		if err.Error() != m.failure {
			m.failure = err.Error()
			m.log.Warn("the list of models can't be fetched from Qwen; the previous list, MODELS or the built-in list is used", "error", err)
		}
		return m.list
	}
	m.list, m.until, m.failure = m.withAliases(objects), time.Now().Add(modelsFresh), ""
	return m.list
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
	var list struct{ Data []json.RawMessage }
	err = json.NewDecoder(io.LimitReader(res.Body, maxModels)).Decode(&list)
	if err != nil || !slices.ContainsFunc(list.Data, func(o json.RawMessage) bool { return modelID(o) != "" }) {
		return nil, errors.Join(fmt.Errorf("%s/models did not answer with a list of models", t.base), err)
	}
	return list.Data, nil
}

// show handles GET /v1/models, and GET /v1/models/{id} with one model.
func (m *models) show(x *exchange, r *http.Request) error {
	list := m.current(r.Context())
	if list == nil {
		return context.Cause(r.Context())
	}
	_, id, one := strings.Cut(r.URL.Path, "/models/")
	if !one {
		writeJSON(x, http.StatusOK, struct {
			Object string            `json:"object"`
			Data   []json.RawMessage `json:"data"`
		}{"list", list})
		return nil
	}
	for _, object := range list {
		if modelID(object) == id {
			writeBody(x, http.StatusOK, object)
			return nil
		}
	}
	return &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "model_not_found", param: "model",
		message: fmt.Sprintf("The model %q does not exist. GET /v1/models lists all models.", clip(id, 100))}
}
