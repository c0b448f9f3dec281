import CPlatform
import EPKernels
import Glibc
import Synchronization

/// A queue of launches that run one after another, each on some of a rank's workers.
///
/// Whoever waits, works: a thread that waits for a launch runs the queue itself, as worker 0, so a call that waits
/// costs no thread switch. For calls that do not wait there is a thread that runs the queue when nobody else does.
/// Workers 1 and up are threads of the stream.
package final class HostStream: @unchecked Sendable {
  /// Something queued: a launch, or another thing to be done in order.
  package struct Task: Sendable {
    var workerCount: Int
    var body: @Sendable (HostMachine) -> Void
  }

  package let workerCountMax: Int
  private let tuning: HostTuning
  private let state: Guarded<State>
  private let crew: Crew
  /// Tasks finished so far. Released after a task's stores, acquired by who waits for it.
  private let finished = SharedWord()
  /// Rung when a task is finished: for those who wait.
  private let finishedBell = SharedBell()
  /// Rung when there is something for the stream's own thread to do.
  private let serviceBell = SharedBell()
  private var thread: pthread_t?

  private struct State {
    var queue: [Task] = []
    var queuedCount: UInt64 = 0
    var isDriven = false
    var isClosing = false
  }

  /// - Throws: nothing; `nil` when the threads cannot be started.
  package init?(workerCount: Int, tuning: HostTuning) {
    workerCountMax = workerCount
    self.tuning = tuning
    state = Guarded(State())
    guard let crew = Crew(helperCount: workerCount - 1, tuning: tuning) else { return nil }
    self.crew = crew
    // SAFETY: `close` joins the thread, at the latest in `deinit`, where a checked reference could not be read any
    // more.
    let started = startThread { [unowned(unsafe) self] in self.serve() }
    guard let started else { return nil }
    thread = started
  }

  deinit { close() }

  /// Finishes what is queued, then ends the stream's threads. Later calls of `enqueue` are not allowed.
  package func close() {
    guard let thread else { return }
    state.withLock { $0.isClosing = true }
    serviceBell.ring()
    precondition(pthread_equal(thread, pthread_self()) == 0, "a stream cannot close itself")
    pthread_join(thread, nil)
    self.thread = nil
    crew.close()
  }

  /// Queues `launch` for `workerCount` workers. Returns its ticket.
  ///
  /// - Parameters:
  ///   - owner: kept alive until the launch has finished.
  ///   - isUrgent: start it now, on the stream's own thread, rather than when somebody waits.
  package func enqueue(
    _ launch: KernelLaunch, workerCount: Int, keeping owner: AnyObject & Sendable, isUrgent: Bool
  ) -> UInt64 {
    let task = Task(workerCount: workerCount) { machine in
      withExtendedLifetime(owner) { launch.run(on: machine) }
    }
    return enqueue(task, isUrgent: isUrgent)
  }

  /// Queues `body`, for one thread.
  package func enqueue(isUrgent: Bool, _ body: @escaping @Sendable () -> Void) -> UInt64 {
    enqueue(Task(workerCount: 1) { _ in body() }, isUrgent: isUrgent)
  }

  private func enqueue(_ task: Task, isUrgent: Bool) -> UInt64 {
    let ticket = state.withLock { state in
      state.queue.append(task)
      state.queuedCount += 1
      return state.queuedCount
    }
    if isUrgent { serviceBell.ring() }
    return ticket
  }

  package func isFinished(_ ticket: UInt64) -> Bool { finished.load() >= ticket }

  /// Waits for the task of `ticket`, working meanwhile; returns false when `deadline` passes first. A task that has
  /// begun is not interrupted.
  package func wait(for ticket: UInt64, until deadline: UInt64 = .max) -> Bool {
    while !isFinished(ticket) {
      if runNext() { continue }
      let isOver = finishedBell.wait(until: deadline, spinningFor: tuning.spinNanoseconds) {
        isFinished(ticket) || isIdleWithWork
      }
      if !isOver { return false }
    }
    return true
  }

  private var isIdleWithWork: Bool {
    state.withLock { !$0.isDriven && !$0.queue.isEmpty }
  }

  /// Runs the first task of the queue on this thread, unless another is at it.
  private func runNext() -> Bool {
    guard takeAndRun() else { return false }
    let isMoreQueued = state.withLock { state in
      state.isDriven = false
      finished.increment()
      return !state.queue.isEmpty || state.isClosing
    }
    finishedBell.ring()
    if isMoreQueued { serviceBell.ring() }
    return true
  }

  /// The task and what it owns are gone when this returns, before anybody learns that it has finished: a caller may
  /// then count on the memory.
  @inline(never)
  private func takeAndRun() -> Bool {
    let task: Task? = state.withLock { state in
      if state.isDriven || state.queue.isEmpty { return nil }
      state.isDriven = true
      return state.queue.removeFirst()
    }
    guard let task else { return false }
    crew.run(task)
    return true
  }

  /// The stream's own thread.
  private func serve() {
    while true {
      while runNext() {}
      let isDone = state.withLock { $0.isClosing && !$0.isDriven && $0.queue.isEmpty }
      if isDone { return }
      _ = serviceBell.wait(until: .max, spinningFor: 0) {
        state.withLock { !$0.isDriven && (!$0.queue.isEmpty || $0.isClosing) }
      }
    }
  }
}

/// Threads that run a launch together with the thread that drives the stream.
private final class Crew: @unchecked Sendable {
  private let tuning: HostTuning
  private var threads: [pthread_t] = []
  /// Launches published so far; its release publishes `task`.
  private let published = SharedWord()
  private let publishedBell = SharedBell()
  /// Helpers that have finished, over all launches; its release publishes their stores.
  private let arrived = SharedWord()
  private let arrivedBell = SharedBell()
  private var task: HostStream.Task?
  private var isClosing = false

  init?(helperCount: Int, tuning: HostTuning) {
    self.tuning = tuning
    for index in 0..<helperCount {
      // SAFETY: `close` joins the threads before this object is gone.
      guard let thread = startThread({ [unowned(unsafe) self] in self.help(as: index + 1) }) else {
        close()
        return nil
      }
      threads.append(thread)
    }
  }

  func run(_ task: HostStream.Task) {
    let machine = HostMachine(workerIndex: 0, workerCount: Int32(task.workerCount), tuning: tuning)
    if task.workerCount == 1 { return task.body(machine) }
    publish(task)
    task.body(machine)
    let everyone = published.load() * UInt64(threads.count)
    _ = arrivedBell.wait(until: .max, spinningFor: tuning.spinNanoseconds) { arrived.load() >= everyone }
    self.task = nil
  }

  private func publish(_ task: HostStream.Task?) {
    self.task = task
    published.increment()
    publishedBell.ring()
  }

  private func help(as index: Int) {
    var seen: UInt64 = 0
    while true {
      seen += 1
      let next = seen
      _ = publishedBell.wait(until: .max, spinningFor: tuning.spinNanoseconds) { published.load() >= next }
      guard runPublished(as: index) else { return }
      arrived.increment()
      arrivedBell.ring()
    }
  }

  /// Runs this worker's part of the published task, holding on to nothing afterwards. Returns false when there is none.
  @inline(never)
  private func runPublished(as index: Int) -> Bool {
    guard let task else { return false }
    if index < task.workerCount {
      task.body(HostMachine(workerIndex: Int32(index), workerCount: Int32(task.workerCount), tuning: tuning))
    }
    return true
  }

  func close() {
    publish(nil)
    for thread in threads { pthread_join(thread, nil) }
    threads = []
  }
}

/// A counter that only grows: what happens before an increment is seen by whoever loads the result.
private final class SharedWord: Sendable {
  private let value = Atomic<UInt64>(0)
  func load() -> UInt64 { value.load(ordering: .acquiring) }
  func increment() { value.wrappingAdd(1, ordering: .releasing) }
}

/// Starts a thread that runs `body`, or returns nil where the system allows no more.
package func startThread(_ body: @escaping @Sendable () -> Void) -> pthread_t? {
  final class Box: Sendable {
    let body: @Sendable () -> Void
    init(_ body: @escaping @Sendable () -> Void) { self.body = body }
  }
  let box = Unmanaged.passRetained(Box(body))
  var thread = pthread_t()
  let code = pthread_create(
    &thread, nil,
    { argument in
      Unmanaged<Box>.fromOpaque(argument!).takeRetainedValue().body()
      return nil
    }, box.toOpaque())
  if code == 0 { return thread }
  box.release()
  return nil
}
