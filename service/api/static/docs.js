// The page at GET /docs: Swagger UI, all of it from here, on /openapi.json.

const find = (id) => document.getElementById(id);

// The same place as on the page at GET /: it ends with the tab, and nothing sends it by itself.
const withKey = (headers = {}) => {
  const key = sessionStorage.getItem("bertqa-key");
  return key ? { ...headers, authorization: `Bearer ${key}` } : headers;
};

async function show() {
  const response = await fetch("openapi.json", { headers: withKey() });
  const reply = await response.json();
  find("key-form").hidden = response.ok;
  if (!response.ok) {
    find("problem").textContent = reply.error;
    find("key").focus();
    return;
  }
  SwaggerUIBundle({
    dom_id: "#api",
    spec: reply,
    deepLinking: true,
    validatorUrl: null,
    requestInterceptor: (request) => ({ ...request, headers: withKey(request.headers) }),
  });
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("bertqa-key", find("key").value);
  show();
});
show();
