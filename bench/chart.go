//go:build linux

package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// A bar is one program's figure in a chart.
type bar struct {
	name  string
	value float64
	ours  bool
}

// chart returns a bar chart of the run as SVG, readable on light and dark pages: CPU time of a 2 KB request and memory of a stream.
func (c *comparison) chart() []byte {
	const (
		width     = 640
		left      = 120 // where bars begin
		longest   = 430 // of a bar
		barHeight = 20
		rowHeight = 28
	)
	var body strings.Builder
	y := 0
	group := func(title, unit, measurement string, decimals int) {
		var bars []bar
		top := 0.0
		for _, p := range c.programs {
			if s := c.results[measurement][p.name]; s != nil && p.name != "bare-2" {
				if v := s[0].spread().median; !math.IsNaN(v) {
					bars = append(bars, bar{p.name, v, p.ours})
					top = max(top, v)
				}
			}
		}
		if len(bars) == 0 {
			return
		}
		y += 30
		fmt.Fprintf(&body, "<text class=\"title\" x=\"0\" y=\"%d\">%s</text>\n", y, html.EscapeString(title))
		y += 12
		for _, b := range bars {
			class := "other"
			if b.ours {
				class = "ours"
			}
			length := max(2, longest*b.value/top)
			fmt.Fprintf(&body, "<text class=\"name\" x=\"%d\" y=\"%d\">%s</text>\n", left-8, y+15, html.EscapeString(b.name))
			fmt.Fprintf(&body, "<rect class=\"%s\" x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"%d\" rx=\"3\"/>\n", class, left, y, length, barHeight)
			fmt.Fprintf(&body, "<text x=\"%.1f\" y=\"%d\">%.*f %s</text>\n", left+length+8, y+15, decimals, b.value, unit)
			y += rowHeight
		}
	}
	group("CPU time of a request with a body of 2 KB (less is better)", "µs", "2k", 0)
	group("Memory of an open stream (less is better)", "kB", "streams", 0)
	return fmt.Appendf(nil, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" role="img" aria-label="CPU time of a request and memory of a stream, by program">
<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.name { text-anchor: end }
.ours { fill: #615ced }
.other { fill: #afb8c1 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .ours { fill: #8b87ff } .other { fill: #57606a } }
</style>
%s</svg>
`, width, y+8, body.String())
}
