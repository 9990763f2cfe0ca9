// What Python calls: functions that take tensors and hand their addresses to the kernel.
//
// ctypes, which loads the library, would take 0.4 us to convert the arguments of a call, an eighth of the loss of ten logits. It
// is asked once for functions of Python's own kind instead. They need nothing but functions of CPython's stable ABI, which are
// declared here: the library is compiled without the headers of a Python, and one build serves every Python.
#include <cmath>

#include "problem.h"

extern "C" {
struct PyObject;
using FastFunction = PyObject* (*)(PyObject* self, PyObject* const* arguments, std::intptr_t n);
struct PyMethodDef {
  const char* name;
  FastFunction function;
  int flags;
  const char* doc;
};
extern PyObject _Py_NoneStruct;
extern PyObject* PyExc_TypeError;
PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
PyObject* PyObject_CallFunctionObjArgs(PyObject* callable, ...);
PyObject* PyObject_CallMethodObjArgs(PyObject* object, PyObject* name, ...);
PyObject* PyUnicode_InternFromString(const char*);
char* PyBytes_AsString(PyObject*);
double PyFloat_AsDouble(PyObject*);
PyObject* PyLong_FromLongLong(long long);
long long PyLong_AsLongLong(PyObject*);
void* PyLong_AsVoidPtr(PyObject*);
PyObject* PyErr_Occurred();
void PyErr_SetString(PyObject* type, const char* message);
void Py_DecRef(PyObject*);
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

namespace fusedloss {
namespace {

constexpr int METH_FASTCALL = 0x0080;

// Memory that was freed begins at 0, and a tensor in it at its offset, which is less than this. Where the memory of a process lies
// lower, as on some machines, Python is asked for every tensor.
constexpr std::uintptr_t PAST_FREED = std::uintptr_t(1) << 44;

// Takes the arguments of a call one after the other.
class Arguments {
 public:
  Arguments(PyObject* check_memory, PyObject* const* next) : check_memory(check_memory), next(next) {}

  template <class... Fields>
  void take(Fields&... fields) {
    (take_one(fields), ...);
  }
  const char* take_bytes() { return PyBytes_AsString(*next++); }
  bool failed() const { return PyErr_Occurred(); }

 private:
  PyObject* check_memory;  // of a tensor: raises where there is none
  PyObject* const* next;

  void take_one(double& number) { number = PyFloat_AsDouble(*next++); }
  void take_one(int64_t& number) { number = PyLong_AsLongLong(*next++); }
  template <class X>
  void take_one(X*& address) {
    address = static_cast<X*>(address_of(*next++));
  }

  void* address_of(PyObject* tensor) {
    if (tensor == &_Py_NoneStruct || failed()) return nullptr;  // Python calls nothing while an exception is set
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* number = PyObject_CallMethodObjArgs(tensor, data_ptr, nullptr);
    void* address = number ? PyLong_AsVoidPtr(number) : nullptr;
    if (number && reinterpret_cast<std::uintptr_t>(address) < PAST_FREED) {
      Py_DecRef(number);
      number = PyObject_CallFunctionObjArgs(check_memory, tensor, nullptr);
    }
    if (number) Py_DecRef(number);
    return address;
  }
};

template <class Function>
PyObject* call_kernel(PyObject* self, PyObject* const* arguments, std::intptr_t n, Function function) {
  // The kind, whether Python's other threads wait meanwhile, a Call, and Extras or none.
  constexpr std::intptr_t N_SHORT = 2 + sizeof(Call) / 8, N_LONG = N_SHORT + sizeof(Extras) / 8;
  if (n != N_SHORT && n != N_LONG) {
    PyErr_SetString(PyExc_TypeError, "the CPU kernel takes the fields of Kind, Call and Extras");
    return nullptr;
  }
  Arguments given(self, arguments);
  const char* kind = given.take_bytes();
  if (!kind) return nullptr;
  int64_t holds_gil;
  Call call;
  Rest rest = {};
  std::memcpy(static_cast<Numbers*>(&rest), kind, sizeof(Numbers));
  std::memcpy(static_cast<Kind*>(&rest), kind + sizeof(Numbers), sizeof(Kind));
  given.take(holds_gil, call.loss, call.saved, call.dlogits, call.row_stats, call.counts, call.logits, call.target, call.weight,
             call.dloss, call.scale, call.n_threads, call.n_examples);
  rest.lam_factor = 1;
  if (n == N_LONG)
    given.take(rest.target_b, rest.lam, rest.sample_weight, rest.shard_stats, rest.lam_factor, rest.first_class, rest.n_classes);
  if (given.failed()) return nullptr;
  void* thread = holds_gil ? nullptr : PyEval_SaveThread();
  const int64_t result = function(&call, &rest);
  if (thread) PyEval_RestoreThread(thread);
  return PyLong_FromLongLong(result);
}

PyObject* forward(PyObject* self, PyObject* const* arguments, std::intptr_t n) {
  return call_kernel(self, arguments, n, fusedloss_forward);
}
PyObject* backward(PyObject* self, PyObject* const* arguments, std::intptr_t n) {
  return call_kernel(self, arguments, n, fusedloss_backward);
}
PyObject* scale_gradient(PyObject* self, PyObject* const* arguments, std::intptr_t n) {
  return call_kernel(self, arguments, n, fusedloss_scale_gradient);
}

PyMethodDef methods[] = {{"forward", forward, METH_FASTCALL, nullptr},
                         {"backward", backward, METH_FASTCALL, nullptr},
                         {"scale_gradient", scale_gradient, METH_FASTCALL, nullptr}};

}  // namespace
}  // namespace fusedloss

// For Python: one of the functions of this name, or null with an exception. check_memory(tensor) raises where a tensor has no memory.
extern "C" __attribute__((visibility("default"))) PyObject* fusedloss_function(const char* name, PyObject* check_memory) {
  for (PyMethodDef& method : fusedloss::methods)
    if (std::strcmp(method.name, name) == 0) return PyCFunction_NewEx(&method, check_memory, nullptr);
  PyErr_SetString(PyExc_TypeError, name);
  return nullptr;
}
