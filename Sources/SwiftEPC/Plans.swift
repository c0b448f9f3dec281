// swift-format-ignore-file: AlwaysUseLowerCamelCase

import CSwiftEP
import Glibc
import SwiftEP

/// A plan that C has been given, and the names of its parts, where C finds them.
final class GivenPlan: @unchecked Sendable {
  let plan: ExpertBuffer.Plan
  fileprivate let names: [UnsafeMutablePointer<CChar>?]

  init(_ plan: ExpertBuffer.Plan) {
    self.plan = plan
    names = plan.parts.map { strdup($0.name) }
  }

  deinit { for name in names { free(name) } }
}

@c @implementation
public func swiftep_plan_create(
  _ options: UnsafePointer<swiftep_plan_options>?, _ plan: UnsafeMutablePointer<OpaquePointer?>?, _ error: ErrorPlace?
) -> swiftep_code {
  attempt(error) { () throws(EPError) in
    let place = try place(plan, "plan")
    place.pointee = give(GivenPlan(try makePlan(try read(options, over: swiftep_plan_options(), "options"))))
  }
}

private func makePlan(_ options: swiftep_plan_options) throws(EPError) -> ExpertBuffer.Plan {
  var shape = JobShape(
    rankCount: Int(options.rank_count), tokensPerRankMax: Int(options.tokens_per_rank_max), hidden: Int(options.hidden),
    topK: Int(options.top_k), expertCount: Int(options.expert_count))
  if options.expert_owners != nil {
    shape.expertOwners = try array(options.expert_owners, options.expert_count, "expert_owners").map { Int($0) }
  }
  shape.dtype = try .given(options.dtype, orElse: .bf16, "dtype")
  shape.scales = try scaleFormat(options.scales, "scales")
  shape.sidecarByteCounts = try array(
    options.sidecar_byte_counts, options.sidecar_count, "sidecar_byte_counts"
  ).map { Int($0) }
  shape.layout = try value(options.layout, of: RowLayout.allCases, "layout")
  shape.expertAlignment = unlessZero(options.expert_alignment) ?? 1
  shape.combineDType = try .given(options.combine_dtype, orElse: .bf16, "combine_dtype")
  shape.combineEncoding = try value(options.combine_encoding, of: RowEncoding.allCases, "combine_encoding")
  shape.indexByteCount = unlessZero(options.index_byte_count) ?? 8
  let stepTokens = unlessZero(options.staged_tokens_per_step)
  let staging: ExpertBuffer.Staging =
    options.is_staged == 0 ? .unplanned : stepTokens.map { .steps(tokens: $0) } ?? .whole
  return try ExpertBuffer.Plan(
    shape, resultCount: unlessZero(options.result_count) ?? 1,
    receivedTokensMax: options.received_tokens_max.map { Int($0.pointee) }, workers: unlessZero(options.workers) ?? 1,
    staging: staging, masking: try value(options.masking, of: ExpertBuffer.Masking.allCases, "masking"),
    arenaByteCountMax: options.arena_byte_count_max == 0 ? nil : options.arena_byte_count_max)
}

/// 0: none.
func scaleFormat(_ number: Int32, _ argument: String) throws(EPError) -> ScaleFormat? {
  number == 0 ? nil : try value(number, of: ScaleFormat.allCases, from: 1, argument)
}

private func plan(_ pointer: OpaquePointer?) -> ExpertBuffer.Plan? { object(pointer, GivenPlan.self)?.plan }

@c @implementation
public func swiftep_plan_byte_count(_ pointer: OpaquePointer?) -> Int64 { plan(pointer)?.byteCount ?? -1 }

@c @implementation
public func swiftep_plan_arena_byte_count(_ pointer: OpaquePointer?) -> Int64 { plan(pointer)?.arenaByteCount ?? -1 }

@c @implementation
public func swiftep_plan_arena_byte_count_max(_ pointer: OpaquePointer?) -> Int64 {
  plan(pointer)?.arenaByteCountMax ?? -1
}

@c @implementation
public func swiftep_plan_rows_per_result(_ pointer: OpaquePointer?) -> Int64 {
  plan(pointer).map { Int64($0.rowsPerResult) } ?? -1
}

@c @implementation
public func swiftep_plan_part_count(_ pointer: OpaquePointer?) -> Int32 {
  plan(pointer).map { Int32($0.parts.count) } ?? 0
}

@c @implementation
public func swiftep_plan_part(
  _ pointer: OpaquePointer?, _ index: Int32, _ name: UnsafeMutablePointer<UnsafePointer<CChar>?>?
) -> Int64 {
  name?.pointee = nil
  guard let given = object(pointer, GivenPlan.self), given.names.indices.contains(Int(index)) else { return -1 }
  name?.pointee = UnsafePointer(given.names[Int(index)])
  return given.plan.parts[Int(index)].byteCount
}

@c @implementation
public func swiftep_plan_free(_ plan: OpaquePointer?) { take(plan) }
