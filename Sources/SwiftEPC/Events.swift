// swift-format-ignore-file: AlwaysUseLowerCamelCase

import CSwiftEP
import SwiftEP

private func event(_ pointer: OpaquePointer?) throws(EPError) -> Event { try object(pointer, "event", Event.self) }

/// What a call is to wait for.
func events(_ pointer: UnsafePointer<OpaquePointer?>?, _ count: Int32) throws(EPError) -> [Event] {
  var events: [Event] = []
  for pointer in try array(pointer, count, "after") { events.append(try object(pointer, "after", Event.self)) }
  return events
}

@c @implementation
public func swiftep_event_create() -> OpaquePointer! { give(Event()) }

@c @implementation
public func swiftep_event_signal(_ pointer: OpaquePointer?) { object(pointer, Event.self)?.signal() }

@c @implementation
public func swiftep_event_record(
  _ stream: UnsafeMutableRawPointer?, _ deviceIndex: Int32, _ event: UnsafeMutablePointer<OpaquePointer?>?,
  _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let place = try place(event, "event")
    place.pointee = give(try Event(recordedOn: CUDAStream(unsafeHandle: stream), gpu: Int(deviceIndex)))
  }
}

@c @implementation
public func swiftep_event_enqueue_wait(
  _ pointer: OpaquePointer?, _ stream: UnsafeMutableRawPointer?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in try event(pointer).enqueueWait(on: CUDAStream(unsafeHandle: stream)) }
}

@c @implementation
public func swiftep_event_is_complete(_ pointer: OpaquePointer?) -> Int32 {
  object(pointer, Event.self).map { $0.isComplete ? 1 : 0 } ?? 0
}

@c @implementation
public func swiftep_event_wait(_ pointer: OpaquePointer?, _ error: ErrorPlace?) -> swiftep_code {
  attempt(error) { () throws(EPError) in try event(pointer).wait() }
}

@c @implementation
public func swiftep_event_free(_ event: OpaquePointer?) { take(event) }
