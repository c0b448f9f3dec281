import SwiftEP

/// Makes rows of one rank go astray, of cached dispatches and of combines: where a chunk's rows begin at a receiver is
/// overwritten in a handle. Checked kernels must say so, with the same error on all ranks, and leave what lies there
/// alone.
///
/// - Throws: `ConformanceFailure`, where they do not; `machineUnavailable`, where nothing is checked.
package func checkBrokenPlaces(on fabric: any Fabric) throws {
  if try !fabric.isChecked {
    throw EPError.machineUnavailable("checks of themselves by kernels: see scripts/build-kernels --checked")
  }
  for layout in RowLayout.allCases {
    for isCombine in [false, true] {
      var job = Job(rankCount: 3, tokenCount: 16, hidden: 64, topK: 2, expertCount: 6)
      job.layout = layout
      try checkBrokenPlace(job, isCombine: isCombine, on: fabric)
    }
  }
}

extension Fabric {
  /// Whether kernels check themselves; asked for where ranks live.
  package var isChecked: Bool {
    get throws {
      let machine = machines[0]
      return try values(rankCount: 1, timeout: .seconds(60)) { _ in try machine.isChecked }[0]
    }
  }
}

private func checkBrokenPlace(_ job: Job, isCombine: Bool, on fabric: any Fabric) throws {
  let errors = try fabric.values(plan: job.makePlan(), workers: 1, timeout: job.timeout) { buffer -> EPError? in
    let tokens = try job.makeTokens(rank: buffer.rank, step: 0).reachable(from: buffer)
    let first = try buffer.dispatch(tokens.x, to: tokens.routing, options: job.dispatchOptions)
    if buffer.rank == 1 {
      first.handle.places.withUnsafeMutableBytes { bytes in
        for place in bytes.bindMemory(to: Int32.self).indices {
          bytes.storeBytes(of: 1000, toByteOffset: 4 * place, as: Int32.self)
        }
      }
    }
    do throws(EPError) {
      if isCombine {
        _ = try buffer.combine(first.rows, with: first.handle)
      } else {
        _ = try buffer.dispatch(tokens.x, to: .cached(first.handle), options: job.dispatchOptions)
      }
    } catch {
      return error
    }
    return nil
  }
  for (rank, error) in errors.enumerated() {
    if case .checkFailed(1, .deliver, _, _, _)? = error, error == errors[0] { continue }
    throw ConformanceFailure(
      job: job, rank: rank, step: isCombine ? "combine" : "cached dispatch",
      what: "expected a failed check of rank 1 as on rank 0, found \(error.map { "\($0)" } ?? "no error")")
  }
}
