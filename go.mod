module qwen-go-proxy

go 1.26.6

require github.com/google/go-cmp v0.7.0
