"""The soak: everything that can happen to a request and to its KV, at once, on a real server; every row is checked.

What makes a check of every row possible:

* **The server computes in float32**, and so does Hugging Face's model: their logits differ by rounding alone, and the
  experts of a token are those of the reference unless two logits are closer than that (`oracle.py` derives the bound).
* **The reference follows the recorded routes.** Where a tie was decided the other way, everything behind it would
  differ. So each layer's recorded set is held against the reference's logits, which come from the recorded sets of the
  layers and tokens before, as long as those hold. A row can then not hide behind itself: in the order of layers and
  tokens, the first one that is wrong meets a reference whose input is right.
* **The checkpoints differ in the last layer's router alone** (`checkpoints.py`). What that layer does ends in the
  logits of the vocabulary and in no KV, so the KV of every token, and its routes in all layers but the last, are the
  same under each of them: a row depends on its tokens and on the weights of its own pass, and on nothing older, however
  often its prefix was cached, loaded, retracted and computed anew in between. The last layer's set is that of exactly
  one checkpoint: a row that bears another version's name is seen there.
* **Names are held against time.** A row that its own request computed bears a name that was in force while the request
  ran; a name that the server gave itself (an update without one) is that of one checkpoint for ever.

So a row that is returned as valid is right if and only if it passes, and one whose KV came from another request, from
host memory or from storage is checked as sharply as one that was just computed.
"""
