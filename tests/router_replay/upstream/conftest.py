from tests.router_replay.upstream.fake_engine import folder, reader

__all__ = ["folder", "reader"]
