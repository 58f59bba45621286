//go:build linux

package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
)

// quantile returns the q-quantile of sorted values, 0 ≤ q ≤ 1, between two of them in proportion; NaN of none.
func quantile[T ~int64 | ~float64](sorted []T, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	at := q * float64(len(sorted)-1)
	i := int(at)
	j := min(i+1, len(sorted)-1)
	return float64(sorted[i]) + (at-float64(i))*float64(sorted[j]-sorted[i])
}

// A series is one figure of one program, a value a round. NaN stands for a round without one.
type series []float64

// A spread is a median with the quartiles around it.
type spread struct{ q1, median, q3 float64 }

func (s series) spread() spread {
	sorted := slices.DeleteFunc(slices.Clone(s), math.IsNaN)
	slices.Sort(sorted)
	return spread{quantile(sorted, 0.25), quantile(sorted, 0.5), quantile(sorted, 0.75)}
}

// over returns the ratio of s to base round by round, so that what disturbs a whole round cancels out.
func (s series) over(base series) series {
	ratios := make(series, min(len(s), len(base)))
	for i := range ratios {
		ratios[i] = s[i] / base[i]
	}
	return ratios
}

// A column is one figure of a measurement.
type column struct {
	title    string
	decimals int
}

func (c column) format(v float64) string {
	if math.IsNaN(v) {
		return "–"
	}
	return fmt.Sprintf("%.*f", c.decimals, v)
}

// results holds all figures: by measurement and program a series for each column.
type results map[string]map[string][]series

// add puts values, one a column, to what there is of a program in a round, counted from 0.
func (r results) add(measurement, program string, round int, values ...float64) {
	if r[measurement] == nil {
		r[measurement] = map[string][]series{}
	}
	columns := r[measurement][program]
	if columns == nil {
		columns = make([]series, len(values))
	}
	for i, v := range values {
		for len(columns[i]) <= round {
			columns[i] = append(columns[i], math.NaN())
		}
		columns[i][round] = v
	}
	r[measurement][program] = columns
}

// table prints a measurement: a line a program, and for the first column the quartiles and the ratios to the programs in bases.
func (r results) table(w io.Writer, m *measurement, programs, bases []string) {
	of := r[m.name]
	if of == nil {
		return
	}
	fmt.Fprintf(w, "\n%s\n", m.title)
	// tabwriter aligns all cells to the right; the names are padded to stand on the left.
	width := 0
	for _, name := range programs {
		width = max(width, len(name))
	}
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintf(tw, "%-*s\t%s\tquartiles\t", width, "", m.columns[0].title)
	for _, base := range bases {
		fmt.Fprintf(tw, "/ %s\tquartiles\t", base)
	}
	for _, c := range m.columns[1:] {
		fmt.Fprintf(tw, "%s\t", c.title)
	}
	fmt.Fprintln(tw)
	for _, name := range programs {
		all, ok := of[name]
		if !ok {
			continue
		}
		s := all[0].spread()
		c := m.columns[0]
		fmt.Fprintf(tw, "%-*s\t%s\t%s\t", width, name, c.format(s.median), between(c, s))
		for _, base := range bases {
			ratio := spread{math.NaN(), math.NaN(), math.NaN()}
			if b, ok := of[base]; ok {
				ratio = all[0].over(b[0]).spread()
			}
			c := column{decimals: 2}
			fmt.Fprintf(tw, "%s\t%s\t", c.format(ratio.median), between(c, ratio))
		}
		for i, c := range m.columns[1:] {
			fmt.Fprintf(tw, "%s\t", c.format(all[i+1].spread().median))
		}
		fmt.Fprintln(tw)
	}
	tw.Flush()
}

// between returns the quartiles of s as text.
func between(c column, s spread) string {
	if math.IsNaN(s.median) {
		return "–"
	}
	return c.format(s.q1) + "–" + c.format(s.q3)
}
