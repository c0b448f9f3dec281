import SwiftEP

/// One rank's input to a dispatch.
package struct RankTokens: Sendable {
  package var x: Tensor
  package var scales: Tensor?
  package var sidecars: [Tensor]
  /// By top-k or by table.
  package var routing: Routing

  package init(x: Tensor, scales: Tensor? = nil, sidecars: [Tensor] = [], routing: Routing) {
    self.x = x
    self.scales = scales
    self.sidecars = sidecars
    self.routing = routing
  }
}
