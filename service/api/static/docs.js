// The page at GET /docs: Swagger UI for /openapi.json, without files from other servers.

const find = (id) => document.getElementById(id);

// The same storage as on the page at GET /: the key is kept until the tab closes, and never sent automatically.
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
