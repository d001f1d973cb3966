// The error of every refusal.
#pragma once

#include <sstream>
#include <stdexcept>

namespace routing_masks {

template <class... Part>
void require(bool condition, const Part&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error("routing_masks: " + message.str());
}

}  // namespace routing_masks
