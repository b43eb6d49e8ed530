# A server with the plugin, on an NVIDIA GPU. Not built or run by this project's tests.
#   docker build -t vllm-sink .
#   docker run --gpus all --ipc=host -p 8000:8000 vllm-sink --model MODEL --attention-backend sink
FROM vllm/vllm-openai:v0.33.0
COPY . /src/vllm-sink
RUN python3 -m pip install --no-deps /src/vllm-sink
