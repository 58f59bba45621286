package main

import (
	"go/build"
	"os"
	"slices"
	"strings"
	"testing"
)

// A file that is embedded but kept out of the build context would break the image alone.
func TestDockerContextHasWhatIsEmbedded(t *testing.T) {
	b, err := os.ReadFile(".dockerignore")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	pkg, err := build.ImportDir(".", 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(pkg.EmbedPatterns) == 0 {
		t.Fatal("nothing is embedded")
	}
	for _, pattern := range pkg.EmbedPatterns {
		if !slices.Contains(lines, "!"+pattern) {
			t.Errorf(".dockerignore leaves out %s, which is embedded: want a line !%s", pattern, pattern)
		}
	}
}
