"""Two real vLLM servers on a CPU, and kvindexer's predictions held against what they report: `make e2e-vllm`."""
