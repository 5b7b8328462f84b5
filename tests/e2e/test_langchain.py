"""LangChain's own standard integration tests, with its OpenAI integration pointed at this server: chat, responses, embeddings.

A test marked here as failing needs a model that is able, and says so; everything that depends on the server alone must pass.
"""

import pytest
from conftest import GOLDENS, MODEL, running
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests
from server import default_model

OTHER = "other"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with running(tmp_path_factory.mktemp("langchain"), {MODEL: default_model(), OTHER: GOLDENS / "qwen3"}) as server:
        yield server


class Served:
    """Tells the standard tests where the server is, before they make their model."""

    base_url: str

    @pytest.fixture(autouse=True)
    def where(self, served):
        type(self).base_url = served.base_url

    @property
    def reach(self) -> dict:
        return {"model": MODEL, "base_url": self.base_url, "api_key": "none", "timeout": 240, "max_retries": 0}


class Chat(Served, ChatModelIntegrationTests):
    """What both APIs have in common."""

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def common(self) -> dict:
        # Without the penalty a model this small says the same again until its tokens are spent.
        return {**self.reach, "temperature": 0, "max_tokens": 300, "extra_body": {"frequency_penalty": 0.8},
                "model_kwargs": {"parallel_tool_calls": False}}

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False

    @property
    def model_override_value(self) -> str:
        return OTHER

    @property
    def structured_output_kwargs(self) -> dict:
        return {"method": "json_schema"}

    @property
    def supported_usage_metadata_details(self) -> dict:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatOpenAI(**self.chat_model_params)
        question = "The tide turned the wheel of the mill. " * 20
        model.invoke(question)
        answer = model.invoke(question) if not stream else None
        if stream:
            for chunk in model.stream(question):
                answer = chunk if answer is None else answer + chunk
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer


    @pytest.mark.xfail(reason="Needs an able model: json_object promises an object, not its keys; this one puts one key into the other.")
    def test_json_mode(self, model) -> None:
        super().test_json_mode(model)

    @pytest.mark.xfail(reason="Needs an able model: the schema of pydantic's older classes allows further keys; this one adds one.")
    def test_structured_output_pydantic_2_v1(self, model) -> None:
        super().test_structured_output_pydantic_2_v1(model)

    @pytest.mark.xfail(reason="Needs an able model: nothing forces the call here, and this one was never trained on tools.")
    def test_agent_loop(self, model) -> None:
        super().test_agent_loop(model)


class TestChat(Chat):
    @property
    def chat_model_params(self) -> dict:
        return {**self.common, "stream_usage": True}


class TestResponses(Chat):
    @property
    def chat_model_params(self) -> dict:
        return {**self.common, "use_responses_api": True}


class TestEmbeddings(Served, EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self):
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict:
        # Otherwise the client cuts texts into tokens of OpenAI's models, which are not this model's.
        return {**self.reach, "check_embedding_ctx_length": False}
