package main

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
)

// The models listed where neither the upstream nor MODELS names any. What an account may use in
// fact differs from account to account.
var (
	oauthModels = []string{"coder-model", "qwen3-coder-plus", "qwen3-coder-flash", "vision-model"}
	keyModels   = []string{"qwen3-coder-plus", "qwen3-coder-flash", "qwen3.6-plus", "qwen3.7-plus", "qwen3.7-max", "qwen3.8-flash", "text-embedding-v4"}
)

// A model is the model object of OpenAI's API.
type model struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"` // Unix seconds
	OwnedBy string `json:"owned_by"`
}

// models handles GET /v1/models and /v1/models/{id}. It never starts a sign-in.
type models struct {
	list []model
}

func newModels(cfg *config) *models {
	ids := cfg.models
	switch {
	case len(ids) > 0:
	case cfg.apiKey != "":
		ids = keyModels
	default:
		ids = oauthModels
	}
	aliases := slices.Sorted(maps.Keys(cfg.aliases))
	m := &models{list: []model{}}
	for _, id := range slices.Concat(ids, []string{cfg.defaultModel}, aliases) {
		if !slices.ContainsFunc(m.list, func(m model) bool { return m.ID == id }) {
			// 2025-07-22, the release of qwen3-coder: these lists know no dates.
			m.list = append(m.list, model{ID: id, Object: "model", Created: 1753142400, OwnedBy: "qwen"})
		}
	}
	return m
}

func (m *models) all(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, map[string]any{"object": "list", "data": m.list})
}

func (m *models) one(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	for _, model := range m.list {
		if model.ID == id {
			writeJSON(w, http.StatusOK, model)
			return
		}
	}
	writeError(w, r, &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "model_not_found", param: "model",
		message: fmt.Sprintf("The model %q does not exist. GET /v1/models lists those there are.", clip(id, 100))})
}
