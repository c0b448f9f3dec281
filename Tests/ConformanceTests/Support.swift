import Conformance
import SwiftEP

extension Tensor {
  var bytes: [UInt8] { withUnsafeBytes { Array($0) } }
}
