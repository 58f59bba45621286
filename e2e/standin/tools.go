package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"slices"
)

// A functionTool is a function to call, as any of the three APIs describes it.
type functionTool struct {
	name   string
	schema any // of the arguments, a JSON schema
}

func (t *functionTool) UnmarshalJSON(b []byte) error {
	type function struct {
		Name       string `json:"name"`
		Parameters any    `json:"parameters"`
	}
	var tool struct {
		function
		InputSchema any      `json:"input_schema"`
		Function    function `json:"function"`
	}
	if err := json.Unmarshal(b, &tool); err != nil {
		return err
	}
	*t = functionTool{cmp.Or(tool.Function.Name, tool.Name), cmp.Or(tool.Function.Parameters, tool.Parameters, tool.InputSchema)}
	return nil
}

// A toolChoice is "none", "auto" or "required", or an object that says so in its type or names a function.
type toolChoice struct {
	mode string
	name string
}

func (t *toolChoice) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &t.mode) == nil {
		return nil
	}
	var typed struct {
		Type string `json:"type"`
	}
	var named functionTool
	if json.Unmarshal(b, &typed) != nil || json.Unmarshal(b, &named) != nil {
		return errors.New("tool_choice must be a string or an object that names a function")
	}
	t.mode, t.name = typed.Type, named.name
	return nil
}

// tool returns the tool that the answer calls: the one that tool_choice names, else the first. It is nil if the answer is a
// text, as it is after a tool's result.
func (c *chatRequest) tool() (*functionTool, *apiError) {
	if c.ToolChoice.mode == "none" || c.Messages[len(c.Messages)-1].Role == "tool" {
		return nil, nil
	}
	for i, tool := range c.Tools {
		if name := tool.name; name != "" && (c.ToolChoice.name == "" || c.ToolChoice.name == name) {
			return &c.Tools[i], nil
		}
	}
	if c.ToolChoice.name != "" {
		return nil, invalidRequest("tool_choice", "invalid_value", "tool_choice names a function that is not in tools.")
	}
	return nil, nil
}

// toolArguments returns arguments that fit schema, as JSON in pieces.
func toolArguments(schema any, text string) []string {
	var pieces []string
	// By runes: half a character in a piece would not survive JSON.
	for piece := range slices.Chunk([]rune(marshalText(exampleObject(schema, text))), 8) {
		pieces = append(pieces, string(piece))
	}
	return pieces
}

// exampleObject returns an object that fits a JSON schema. It is empty if schema is for something else.
func exampleObject(schema any, text string) object {
	if o, ok := example(schema, text).(object); ok {
		return o
	}
	return object{}
}

// example returns a simple value that fits a JSON schema: an object has only the required properties, and strings are text.
// It does not follow $ref.
func example(schema any, text string) any {
	s, _ := schema.(object) // nil reads as an empty schema, which allows any value
	if enum, _ := s["enum"].([]any); len(enum) > 0 {
		return enum[0]
	}
	if anyOf, _ := s["anyOf"].([]any); len(anyOf) > 0 {
		return example(anyOf[0], text)
	}
	typ := s["type"]
	if types, _ := typ.([]any); len(types) > 0 { // such as ["string", "null"]
		typ = types[0]
	}
	switch typ {
	case "object":
		properties, _ := s["properties"].(object)
		required, _ := s["required"].([]any)
		o := object{}
		for _, name := range required {
			if name, ok := name.(string); ok {
				o[name] = example(properties[name], text)
			}
		}
		return o
	case "array":
		return []any{}
	case "number", "integer":
		return 1
	case "boolean":
		return true
	case "null":
		return nil
	default:
		return text
	}
}

// marshalText returns v, which came from JSON, as JSON again.
func marshalText(v any) string {
	b, _ := json.Marshal(v) // what came from JSON always marshals
	return string(b)
}
