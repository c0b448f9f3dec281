// swift-format-ignore-file: AlwaysUseLowerCamelCase

import CSwiftEP
import SwiftEP

@c @implementation
public func swiftep_graph_record(
  _ buffer: OpaquePointer?, _ body: (@convention(c) (UnsafeMutableRawPointer?) -> swiftep_code)?,
  _ context: UnsafeMutableRawPointer?, _ graph: UnsafeMutablePointer<OpaquePointer?>?, _ error: ErrorPlace?
) -> swiftep_code {
  var code: swiftep_code = 0
  let outcome = attempt(error) { () throws(EPError) in
    let place = try place(graph, "graph")
    let buffer = try object(buffer, "buffer", GivenBuffer.self).buffer
    guard let body else { throw .unusable("body", expected: "a function", found: "NULL") }
    do throws(EPError) {
      let (recorded, _) = try buffer.record { () throws(EPError) in
        code = body(context)
        if code != 0 { throw .unusable("body", expected: "0", found: "\(code)") }
      }
      place.pointee = give(recorded)
    } catch  where code != 0 {
      // The caller knows why.
    }
  }
  return code == 0 ? outcome : code
}

@c @implementation
public func swiftep_graph_launch(
  _ graph: OpaquePointer?, _ usesStream: Int32, _ stream: UnsafeMutableRawPointer?,
  _ event: UnsafeMutablePointer<OpaquePointer?>?, _ error: ErrorPlace?
) -> swiftep_code {
  event?.pointee = nil
  return attempt(error) { () throws(EPError) in
    let launched = try object(graph, "graph", OperationGraph.self).launch(
      stream: callerStream(usesStream, stream))
    event?.pointee = give(launched)
  }
}

@c @implementation
public func swiftep_graph_free(_ graph: OpaquePointer?) { take(graph) }
