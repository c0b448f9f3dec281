/// A byte address that the workers of one rank can reach: host memory on a CPU, device memory on a GPU.
///
/// It carries no length. What may be read or written there, and when, is said by whoever hands it out.
@frozen public struct Address: Equatable, Sendable {
  public var bits: UInt64

  @inlinable public init(bits: UInt64) { self.bits = bits }

  /// Stands for "absent": an optional input that was not given, or no destination.
  @inlinable public static var null: Address { Address(bits: 0) }

  @inlinable public var isNull: Bool { bits == 0 }

  @inlinable public func advanced(byBytes byteCount: Int64) -> Address {
    Address(bits: bits &+ UInt64(bitPattern: byteCount))
  }

  @inlinable var pointer: UnsafeMutableRawPointer {
    // SAFETY: an address is dereferenced only where its owner said so, and never when it is null.
    UnsafeMutableRawPointer(bitPattern: UInt(bits)).unsafelyUnwrapped
  }

  /// Reads element `index` of an array of `Element` that begins here.
  @inlinable public func load<Element: BitwiseCopyable>(_ type: Element.Type, at index: Int32) -> Element {
    pointer.assumingMemoryBound(to: type)[Int(index)]
  }

  /// Writes element `index` of an array of `Element` that begins here.
  @inlinable public func store<Element: BitwiseCopyable>(_ value: Element, at index: Int32) {
    pointer.assumingMemoryBound(to: Element.self)[Int(index)] = value
  }
}
