//go:build linux

package main

import (
	"bytes"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	for _, test := range []struct {
		sorted []float64
		q      float64
		want   float64
	}{
		{[]float64{5}, 0.5, 5},
		{[]float64{5}, 0.99, 5},
		{[]float64{1, 2}, 0.5, 1.5},
		{[]float64{1, 2, 9}, 0.5, 2},
		{[]float64{1, 2, 3, 4, 5}, 0.25, 2},
		{[]float64{1, 2, 3, 4, 5}, 0, 1},
		{[]float64{1, 2, 3, 4, 5}, 1, 5},
		{[]float64{0, 10}, 0.75, 7.5},
	} {
		if got := quantile(test.sorted, test.q); got != test.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", test.sorted, test.q, got, test.want)
		}
	}
	if got := quantile([]float64(nil), 0.5); !math.IsNaN(got) {
		t.Errorf("quantile of nothing = %v, want NaN", got)
	}
	if got := quantile([]time.Duration{2, 4}, 0.5); got != 3 {
		t.Errorf("quantile of durations = %v, want 3", got)
	}
}

func TestSeriesPairsRounds(t *testing.T) {
	nan := math.NaN()
	// Everything took twice as long in the second round, and the third failed for one of the two.
	ours, base := series{2, 4, 9, 2}, series{1, 2, nan, 1}
	if got, want := ours.over(base).spread(), (spread{2, 2, 2}); got != want {
		t.Errorf("ratios %v, want %v", got, want)
	}
	if got, want := base.spread(), (spread{1, 1, 1.5}); got != want {
		t.Errorf("spread %v, want %v", got, want)
	}
	if got := (series{nan}).spread(); !math.IsNaN(got.median) {
		t.Errorf("spread of nothing %v, want NaN", got)
	}
	if got := ours.over(series{1}); len(got) != 1 {
		t.Errorf("ratios %v to a series of one round, want one", got)
	}
}

func TestTable(t *testing.T) {
	r := results{}
	m := &measurement{name: "m", title: "Title", columns: []column{{"µs", 1}, {"n/s", 0}}}
	r.add("m", "new", 0, 10, 100)
	r.add("m", "new", 2, 30, 300)
	r.add("m", "bare", 0, 5, 50)
	r.add("m", "bare", 1, 7, 60)
	r.add("m", "bare", 2, 10, 70)
	r.add("m", "direct", 0, math.NaN(), 900)
	var b bytes.Buffer
	r.table(&b, m, []string{"new", "failed", "bare", "direct"}, []string{"bare"})
	var got [][]string
	for line := range strings.Lines(b.String()) {
		got = append(got, strings.Fields(line))
	}
	want := [][]string{
		{}, {"Title"},
		{"µs", "quartiles", "/", "bare", "quartiles", "n/s"},
		{"new", "20.0", "15.0–25.0", "2.50", "2.25–2.75", "200"},
		{"bare", "7.0", "6.0–8.5", "1.00", "1.00–1.00", "60"},
		{"direct", "–", "–", "–", "–", "900"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the table is\n%q\nwant\n%q", got, want)
	}
}
