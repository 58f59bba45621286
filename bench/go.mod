module qwen-go-proxy/bench

go 1.26.6
