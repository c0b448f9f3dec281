import CCUDA

package typealias CUHandle = OpaquePointer

/// The driver's functions, by the names that its library has for them.
struct DriverTable: Sendable {
  typealias Code = Int32
  typealias Size = Int
  typealias Out<Value> = UnsafeMutablePointer<Value>

  let cuInit: @convention(c) (UInt32) -> Code
  let cuDriverGetVersion: @convention(c) (Out<Int32>) -> Code
  let cuGetErrorName: @convention(c) (Code, Out<UnsafePointer<CChar>?>) -> Code

  let cuDeviceGetCount: @convention(c) (Out<Int32>) -> Code
  let cuDeviceGet: @convention(c) (Out<Int32>, Int32) -> Code
  let cuDeviceGetName: @convention(c) (Out<CChar>, Int32, Int32) -> Code
  let cuDeviceGetAttribute: @convention(c) (Out<Int32>, Int32, Int32) -> Code
  let cuDeviceTotalMem: @convention(c) (Out<Size>, Int32) -> Code
  let cuDeviceCanAccessPeer: @convention(c) (Out<Int32>, Int32, Int32) -> Code
  /// Into 16 bytes.
  let cuDeviceGetUuid: @convention(c) (Out<UInt8>, Int32) -> Code

  let cuDevicePrimaryCtxRetain: @convention(c) (Out<CUHandle?>, Int32) -> Code
  let cuDevicePrimaryCtxRelease: @convention(c) (Int32) -> Code
  let cuCtxSetCurrent: @convention(c) (CUHandle?) -> Code
  let cuMemGetInfo: @convention(c) (Out<Size>, Out<Size>) -> Code

  let cuModuleLoadData: @convention(c) (Out<CUHandle?>, UnsafeRawPointer) -> Code
  let cuModuleUnload: @convention(c) (CUHandle) -> Code
  let cuModuleGetFunction: @convention(c) (Out<CUHandle?>, CUHandle, UnsafePointer<CChar>) -> Code
  let cuModuleGetGlobal: @convention(c) (Out<UInt64>, Out<Size>, CUHandle, UnsafePointer<CChar>) -> Code
  let cuFuncSetAttribute: @convention(c) (CUHandle, Int32, Int32) -> Code
  let cuFuncGetAttribute: @convention(c) (Out<Int32>, Int32, CUHandle) -> Code
  let cuOccupancyMaxActiveBlocksPerMultiprocessor: @convention(c) (Out<Int32>, CUHandle, Int32, Size) -> Code
  let cuLaunchKernelEx:
    @convention(c) (
      UnsafePointer<swiftep_cu_launch>, CUHandle, UnsafeMutablePointer<UnsafeMutableRawPointer?>,
      UnsafeMutableRawPointer?
    ) -> Code

  let cuStreamCreate: @convention(c) (Out<CUHandle?>, UInt32) -> Code
  let cuStreamDestroy: @convention(c) (CUHandle) -> Code
  let cuStreamSynchronize: @convention(c) (CUHandle?) -> Code
  let cuStreamQuery: @convention(c) (CUHandle?) -> Code
  let cuStreamWaitEvent: @convention(c) (CUHandle?, CUHandle, UInt32) -> Code
  let cuStreamWriteValue64: @convention(c) (CUHandle?, UInt64, UInt64, UInt32) -> Code
  let cuStreamWaitValue64: @convention(c) (CUHandle?, UInt64, UInt64, UInt32) -> Code
  let cuStreamBatchMemOp: @convention(c) (CUHandle?, UInt32, Out<swiftep_cu_wait>, UInt32) -> Code
  let cuThreadExchangeStreamCaptureMode: @convention(c) (Out<Int32>) -> Code
  let cuStreamIsCapturing: @convention(c) (CUHandle?, Out<Int32>) -> Code
  let cuStreamGetCaptureInfo:
    @convention(c) (
      CUHandle?, Out<Int32>, Out<UInt64>?, Out<CUHandle?>?, UnsafeMutableRawPointer?, Out<Size>?
    ) -> Code
  let cuLaunchHostFunc:
    @convention(c) (CUHandle?, @convention(c) (UnsafeMutableRawPointer?) -> Void, UnsafeMutableRawPointer?) -> Code

  let cuEventCreate: @convention(c) (Out<CUHandle?>, UInt32) -> Code
  let cuEventDestroy: @convention(c) (CUHandle) -> Code
  let cuEventRecord: @convention(c) (CUHandle, CUHandle?) -> Code
  let cuEventQuery: @convention(c) (CUHandle) -> Code
  let cuEventSynchronize: @convention(c) (CUHandle) -> Code
  let cuEventElapsedTime: @convention(c) (Out<Float>, CUHandle, CUHandle) -> Code

  let cuStreamBeginCapture: @convention(c) (CUHandle?, Int32) -> Code
  let cuStreamEndCapture: @convention(c) (CUHandle?, Out<CUHandle?>) -> Code
  let cuUserObjectCreate:
    @convention(c) (
      Out<CUHandle?>, UnsafeMutableRawPointer, @convention(c) (UnsafeMutableRawPointer?) -> Void, UInt32, UInt32
    ) -> Code
  let cuGraphRetainUserObject: @convention(c) (CUHandle, CUHandle, UInt32, UInt32) -> Code
  let cuGraphInstantiate: @convention(c) (Out<CUHandle?>, CUHandle, UInt64) -> Code
  let cuGraphLaunch: @convention(c) (CUHandle, CUHandle?) -> Code
  let cuGraphExecDestroy: @convention(c) (CUHandle) -> Code
  let cuGraphDestroy: @convention(c) (CUHandle) -> Code

  let cuMemHostAlloc: @convention(c) (Out<UnsafeMutableRawPointer?>, Size, UInt32) -> Code
  let cuMemFreeHost: @convention(c) (UnsafeMutableRawPointer) -> Code
  let cuMemHostRegister: @convention(c) (UnsafeMutableRawPointer, Size, UInt32) -> Code
  let cuMemHostUnregister: @convention(c) (UnsafeMutableRawPointer) -> Code
  let cuMemcpyHtoDAsync: @convention(c) (UInt64, UnsafeRawPointer, Size, CUHandle?) -> Code
  let cuMemcpyDtoHAsync: @convention(c) (UnsafeMutableRawPointer, UInt64, Size, CUHandle?) -> Code
  let cuMemcpyDtoDAsync: @convention(c) (UInt64, UInt64, Size, CUHandle?) -> Code
  let cuMemsetD8Async: @convention(c) (UInt64, UInt8, Size, CUHandle?) -> Code

  let cuMemAddressReserve: @convention(c) (Out<UInt64>, Size, Size, UInt64, UInt64) -> Code
  let cuMemAddressFree: @convention(c) (UInt64, Size) -> Code
  let cuMemGetAllocationGranularity: @convention(c) (Out<Size>, UnsafePointer<swiftep_cu_allocation>, Int32) -> Code
  let cuMemCreate: @convention(c) (Out<UInt64>, Size, UnsafePointer<swiftep_cu_allocation>, UInt64) -> Code
  let cuMemRelease: @convention(c) (UInt64) -> Code
  let cuMemMap: @convention(c) (UInt64, Size, Size, UInt64, UInt64) -> Code
  let cuMemUnmap: @convention(c) (UInt64, Size) -> Code
  let cuMemSetAccess: @convention(c) (UInt64, Size, UnsafePointer<swiftep_cu_access>, Size) -> Code
  let cuMemExportToShareableHandle: @convention(c) (UnsafeMutableRawPointer, UInt64, Int32, UInt64) -> Code
  let cuMemImportFromShareableHandle: @convention(c) (Out<UInt64>, UnsafeMutableRawPointer?, Int32) -> Code

  init(_ library: Library) throws(DriverAbsence) {
    cuInit = try library.symbol("cuInit")
    cuDriverGetVersion = try library.symbol("cuDriverGetVersion")
    cuGetErrorName = try library.symbol("cuGetErrorName")
    cuDeviceGetCount = try library.symbol("cuDeviceGetCount")
    cuDeviceGet = try library.symbol("cuDeviceGet")
    cuDeviceGetName = try library.symbol("cuDeviceGetName")
    cuDeviceGetAttribute = try library.symbol("cuDeviceGetAttribute")
    cuDeviceTotalMem = try library.symbol("cuDeviceTotalMem_v2")
    cuDeviceCanAccessPeer = try library.symbol("cuDeviceCanAccessPeer")
    cuDeviceGetUuid = try library.symbol("cuDeviceGetUuid_v2")
    cuDevicePrimaryCtxRetain = try library.symbol("cuDevicePrimaryCtxRetain")
    cuDevicePrimaryCtxRelease = try library.symbol("cuDevicePrimaryCtxRelease_v2")
    cuCtxSetCurrent = try library.symbol("cuCtxSetCurrent")
    cuMemGetInfo = try library.symbol("cuMemGetInfo_v2")
    cuModuleLoadData = try library.symbol("cuModuleLoadData")
    cuModuleUnload = try library.symbol("cuModuleUnload")
    cuModuleGetFunction = try library.symbol("cuModuleGetFunction")
    cuModuleGetGlobal = try library.symbol("cuModuleGetGlobal_v2")
    cuFuncSetAttribute = try library.symbol("cuFuncSetAttribute")
    cuFuncGetAttribute = try library.symbol("cuFuncGetAttribute")
    cuOccupancyMaxActiveBlocksPerMultiprocessor = try library.symbol("cuOccupancyMaxActiveBlocksPerMultiprocessor")
    cuLaunchKernelEx = try library.symbol("cuLaunchKernelEx")
    cuStreamCreate = try library.symbol("cuStreamCreate")
    cuStreamDestroy = try library.symbol("cuStreamDestroy_v2")
    cuStreamSynchronize = try library.symbol("cuStreamSynchronize")
    cuStreamQuery = try library.symbol("cuStreamQuery")
    cuStreamWaitEvent = try library.symbol("cuStreamWaitEvent")
    cuStreamWriteValue64 = try library.symbol("cuStreamWriteValue64_v2")
    cuStreamWaitValue64 = try library.symbol("cuStreamWaitValue64_v2")
    cuStreamBatchMemOp = try library.symbol("cuStreamBatchMemOp_v2")
    cuThreadExchangeStreamCaptureMode = try library.symbol("cuThreadExchangeStreamCaptureMode")
    cuStreamIsCapturing = try library.symbol("cuStreamIsCapturing")
    cuStreamGetCaptureInfo = try library.symbol("cuStreamGetCaptureInfo_v2")
    cuLaunchHostFunc = try library.symbol("cuLaunchHostFunc")
    cuEventCreate = try library.symbol("cuEventCreate")
    cuEventDestroy = try library.symbol("cuEventDestroy_v2")
    cuEventRecord = try library.symbol("cuEventRecord")
    cuEventQuery = try library.symbol("cuEventQuery")
    cuEventSynchronize = try library.symbol("cuEventSynchronize")
    cuEventElapsedTime = try library.symbol("cuEventElapsedTime")
    cuStreamBeginCapture = try library.symbol("cuStreamBeginCapture_v2")
    cuStreamEndCapture = try library.symbol("cuStreamEndCapture")
    cuUserObjectCreate = try library.symbol("cuUserObjectCreate")
    cuGraphRetainUserObject = try library.symbol("cuGraphRetainUserObject")
    cuGraphInstantiate = try library.symbol("cuGraphInstantiateWithFlags")
    cuGraphLaunch = try library.symbol("cuGraphLaunch")
    cuGraphExecDestroy = try library.symbol("cuGraphExecDestroy")
    cuGraphDestroy = try library.symbol("cuGraphDestroy")
    cuMemHostAlloc = try library.symbol("cuMemHostAlloc")
    cuMemFreeHost = try library.symbol("cuMemFreeHost")
    cuMemHostRegister = try library.symbol("cuMemHostRegister_v2")
    cuMemHostUnregister = try library.symbol("cuMemHostUnregister")
    cuMemcpyHtoDAsync = try library.symbol("cuMemcpyHtoDAsync_v2")
    cuMemcpyDtoHAsync = try library.symbol("cuMemcpyDtoHAsync_v2")
    cuMemcpyDtoDAsync = try library.symbol("cuMemcpyDtoDAsync_v2")
    cuMemsetD8Async = try library.symbol("cuMemsetD8Async")
    cuMemAddressReserve = try library.symbol("cuMemAddressReserve")
    cuMemAddressFree = try library.symbol("cuMemAddressFree")
    cuMemGetAllocationGranularity = try library.symbol("cuMemGetAllocationGranularity")
    cuMemCreate = try library.symbol("cuMemCreate")
    cuMemRelease = try library.symbol("cuMemRelease")
    cuMemMap = try library.symbol("cuMemMap")
    cuMemUnmap = try library.symbol("cuMemUnmap")
    cuMemSetAccess = try library.symbol("cuMemSetAccess")
    cuMemExportToShareableHandle = try library.symbol("cuMemExportToShareableHandle")
    cuMemImportFromShareableHandle = try library.symbol("cuMemImportFromShareableHandle")
  }
}
